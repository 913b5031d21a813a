"""Folders and Unix users of sessions. Both are created at first use, and never reused while any trace is left.

The folders are in `<state>/sessions`, which only root can change, so a name in it cannot become a link. Each session
gets a uid that nothing else on the host uses; the range comes from the process that starts the agent. Only when all
uids are used is one reused: that of the session that was removed longest ago, of which nothing is left (its processes
ended with their pid namespace, its folder is removed, and nothing else was ever writable to it). The uid of a session
whose folder could not be removed is not reused. Root never follows what a session created in its folder: lookups go
step by step without links, removal goes by descriptors. `storage` limits how much a folder may hold.

Rejected: an agent that asks to be replaced when its uids are used up. That would end a dedicated agent's sessions.
"""

from __future__ import annotations

import os
import re
import stat
from collections import deque
from contextlib import suppress

from hypercore_agents.agent.launcher.storage import PARTS, Storage, Usage

_NAME = re.compile(r"[0-9a-f][0-9a-f-]{7,63}")


class Folders:
    """The user and the folder of each session. `uids` are those that this agent may assign."""

    def __init__(self, state: str, uids: range, storage: Storage) -> None:
        self.storage = storage
        self.root = os.path.join(os.path.realpath(state), "sessions")
        os.makedirs(self.root, mode=0o700, exist_ok=True)
        os.chmod(self.root, 0o700)
        self._unused_uids = iter(uids)
        self._released_uids: deque[int] = deque()
        self._uids: dict[str, int] = {}

    def open(self, session: str, *, writes: bool = True) -> tuple[str, int]:
        """Return the folder and the uid of a session, created if they do not exist.

        `writes`: for a process that may take space, so the session's limit must fit the disk. Reading and removing must
        work on a full disk. Raises ValueError, InsufficientDisk or OSError.
        """
        if _NAME.fullmatch(session) is None:
            raise ValueError("session: must be 8 to 64 hexadecimal digits and dashes")
        path = os.path.join(self.root, session)
        if session in self._uids:
            if writes:
                self.storage.activate(session)
            return path, self._uids[session]
        uid = next(self._unused_uids, None) or (self._released_uids.popleft() if self._released_uids else None)
        if uid is None:
            raise OSError("all uids of this agent are in use; delete a session or raise --session-uids")
        try:
            self._create(session, path, uid)
        except OSError:  # a full disk; nothing ran as this user
            self._released_uids.append(uid)
            raise
        self._uids[session] = uid
        return path, uid

    def _create(self, session: str, path: str, uid: int) -> None:
        self.storage.create(session, path, uid)
        try:
            for part in PARTS:
                with suppress(FileExistsError):
                    os.mkdir(os.path.join(path, part), 0o700)
                os.chown(os.path.join(path, part), uid, uid)
            os.chown(path, uid, uid)
        except OSError:
            with suppress(OSError):
                self.storage.remove(session, path)
            self.storage.forget(session)
            raise

    def usage(self, session: str) -> Usage | None:
        """Return a session's disk usage, None where the kernel does not count it."""
        return self.storage.usage(session) if session in self._uids else None

    def uid(self, session: str) -> int | None:
        """Return the uid of a session, None if it has none yet."""
        return self._uids.get(session)

    def file_size(self, session: str, parts: list[str]) -> int | None:
        """Return the size of a regular file below a session's folder, None if there is none."""
        if session not in self._uids or not parts:
            return None
        folder = os.open(os.path.join(self.root, session), os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            for part in parts[:-1]:
                below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = below
            info = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
        except OSError:
            return None
        finally:
            os.close(folder)
        return info.st_size if stat.S_ISREG(info.st_mode) else None

    def remove(self, session: str) -> bool:
        """Remove a session's folder; its processes must have ended. Blocks. Raises OSError."""
        if session not in self._uids:
            return False
        self.storage.remove(session, os.path.join(self.root, session))
        return True

    def forget(self, session: str) -> None:
        """Drop a session of which nothing is left; its uid is reused once no unused one is left."""
        uid = self._uids.pop(session, None)
        if uid is not None:
            self.storage.forget(session)
            self._released_uids.append(uid)
