"""Sessions' folders and users: made at first use, never given to another while anything of the first is left.

The folders lie in one that only root can change (`<state>/sessions`), so a name in it cannot become a link. A user's
number goes to one session; whoever starts the agent gives it numbers that nobody else on the host has. Only when all
numbers are used up does one come back: that of the session that was removed longest ago, of which nothing is left
(its processes ended with their pid namespace, its folder is gone, and nothing else was ever writable to it). One whose
folder could not be removed stays spent. What a session made of its own folder is never followed as root: looking goes
step by step without links, removing by descriptors. How much a folder may hold is the business of `storage`.

Rejected: an agent that has used up its users and asks to be replaced. A dedicated agent's sessions would end with it.
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
    """Which session has which user and folder. `uids` is what this agent may give out."""

    def __init__(self, state: str, uids: range, storage: Storage) -> None:
        self.storage = storage
        self.root = os.path.join(os.path.realpath(state), "sessions")
        os.makedirs(self.root, mode=0o700, exist_ok=True)
        os.chmod(self.root, 0o700)
        self._fresh = iter(uids)
        self._used: deque[int] = deque()
        self._uids: dict[str, int] = {}

    def open(self, session: str, *, writes: bool = True) -> tuple[str, int]:
        """Return folder and user of a session, made if they are new.

        `writes`: for a process that may take space there, so that the session's limit must fit the disk; reading and
        removing must work on a full one. Raises ValueError, NoDisk or OSError.
        """
        if _NAME.fullmatch(session) is None:
            raise ValueError("session: a name of 8 to 64 hexadecimal digits and dashes")
        path = os.path.join(self.root, session)
        if session in self._uids:
            if writes:
                self.storage.wake(session)
            return path, self._uids[session]
        uid = next(self._fresh, None) or (self._used.popleft() if self._used else None)
        if uid is None:
            raise OSError("all users of this agent have a session; delete one, or give it more (--session-uids)")
        try:
            self._make(session, path, uid)
        except OSError:  # a full disk; nothing of the user's has run yet
            self._used.append(uid)
            raise
        self._uids[session] = uid
        return path, uid

    def _make(self, session: str, path: str, uid: int) -> None:
        self.storage.make(session, path, uid)
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
        """Return what a session has of its disk, None where the kernel does not count it."""
        return self.storage.usage(session) if session in self._uids else None

    def uid(self, session: str) -> int | None:
        """Return the user of a session, None when it has none yet."""
        return self._uids.get(session)

    def look(self, session: str, parts: list[str]) -> int | None:
        """Return the size of a regular file below a session's folder, None when there is none."""
        if session not in self._uids or not parts:
            return None
        here = os.open(os.path.join(self.root, session), os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            for part in parts[:-1]:
                below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
                os.close(here)
                here = below
            found = os.stat(parts[-1], dir_fd=here, follow_symlinks=False)
        except OSError:
            return None
        finally:
            os.close(here)
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def remove(self, session: str) -> bool:
        """Remove a session's folder; its processes must be gone. Blocks. Raises OSError."""
        if session not in self._uids:
            return False
        self.storage.remove(session, os.path.join(self.root, session))
        return True

    def forget(self, session: str) -> None:
        """Let go of a session of which nothing is left; its user may come back when there is no fresh one."""
        uid = self._uids.pop(session, None)
        if uid is not None:
            self.storage.forget(session)
            self._used.append(uid)
