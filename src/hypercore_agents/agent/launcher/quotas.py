"""A quota of bytes and files for each session's user, where the file system counts by user (microVMs).

All sessions share one disk, so limits that add up to more than it has would let some of them take what others were
promised. So the limits of the active sessions are set anew whenever one becomes active or rests: each may have `limit`,
or its equal share of the disk where that is less. A session that already has more than its share keeps what it has and
gets no more. What the share would fall below `_LEAST` for is refused, with the numbers.

Before a share is counted on, all other limits are lowered to it and usage is read again: what is written meanwhile is
held to a limit that was counted.

Rejected: project quotas (a file's owner may change its project). Fixed limits whose sum fits: a microVM for many
sessions would give each a few megabytes, though most of them use none.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from contextlib import suppress

from hypercore_agents.agent.launcher.storage import NoDisk, Storage, Usage

_MB = 1 << 20
_BLOCK = 1024
"""Unit of the limits in `struct if_dqblk` (quotactl(2), QIF_DQBLKSIZE)."""
_LEAST = 16 * _MB, 1000
"""Bytes and files below which a session is refused."""
_RESERVED_SHARE = 0.05
"""Of the disk: what the agent's server and the file system itself may take."""
_GETQUOTA, _SETQUOTA, _XGETQSTAT = 0x800007, 0x800008, 0x5805
_STAT_FLAGS, _ENFORCED = 2, 2
"""Offset of `qs_flags` in `struct fs_quota_stat`, and its flag for users' limits."""
_USER = 0
_LIMITS = 1 | 4
_DQBLK = struct.Struct("=8QI4x")
_SYS_QUOTACTL_FD = 443
_libc = ctypes.CDLL(None, use_errno=True)


class UserQuotas:
    """quotactl(2) for the users of the file system on which a folder lies. Linux 5.14."""

    def __init__(self, folder: str) -> None:
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def enforced(self) -> bool:
        """Say whether the file system counts users and holds them to limits."""
        block = bytearray(128)
        try:
            self._call(_XGETQSTAT, 0, block)
        except OSError:
            return False
        return bool(int.from_bytes(block[_STAT_FLAGS : _STAT_FLAGS + 2], sys.byteorder) & _ENFORCED)

    def used(self, uid: int) -> tuple[int, int]:
        """Return a user's bytes and files. Raises OSError."""
        block = bytearray(_DQBLK.size)
        self._call(_GETQUOTA, uid, block)
        fields = _DQBLK.unpack(block)
        return fields[2], fields[5]

    def limit(self, uid: int, size: int, files: int) -> None:
        """Let a user have so many bytes and files, and no more from now on; 0: no limit. Raises OSError."""
        blocks = -(-size // _BLOCK)
        self._call(_SETQUOTA, uid, bytearray(_DQBLK.pack(blocks, blocks, 0, files, files, 0, 0, 0, _LIMITS)))

    def _call(self, command: int, uid: int, block: bytearray) -> None:
        buffer = (ctypes.c_char * len(block)).from_buffer(block)
        result = _libc.syscall(
            ctypes.c_long(_SYS_QUOTACTL_FD), ctypes.c_uint(self._folder),
            ctypes.c_uint(command << 8 | _USER), ctypes.c_uint(uid), buffer,
        )  # fmt: skip
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"quotactl: {os.strerror(number)}")


class Quotas(Storage):
    """Sets and lifts quotas of sessions' users. `limit_mb` and `files` are what one session may have at most."""

    method = "quota"

    def __init__(self, state: str, limit_mb: int, files: int, quotas: UserQuotas | None = None) -> None:
        super().__init__("")
        self._state = os.path.realpath(state)
        self._most = limit_mb * _MB, min(files, os.statvfs(self._state).f_files // 4)
        self._quotas = quotas or UserQuotas(self._state)
        self._uids: dict[str, int] = {}
        self._active: set[str] = set()
        self._limits: dict[str, tuple[int, int]] = {}

    def make(self, session: str, path: str, uid: int) -> None:
        """Make a folder and give its user a quota. Raises NoDisk when the agent's disk is promised, or OSError."""
        self._uids[session] = uid
        try:
            self._activate(session)
            os.mkdir(path, 0o700)
        except BaseException:
            self.forget(session)
            raise

    def wake(self, session: str) -> None:
        """Give the session its share again. Raises NoDisk."""
        if session in self._uids and session not in self._active:
            self._activate(session)

    def rest(self, session: str) -> None:
        """Share what the session left among the others."""
        if session in self._active:
            self._active.discard(session)
            with suppress(OSError):
                self._share()

    def usage(self, session: str) -> Usage | None:
        """Return what the kernel counted of the session's user."""
        uid = self._uids.get(session)
        if uid is None or session not in self._limits:
            return None
        used, files = self._quotas.used(uid)
        limit, most_files = self._limits[session]
        less = limit < self._most[0] or most_files < self._most[1]
        return Usage(used, limit, files, most_files, len(self._active) if less else 0)

    def forget(self, session: str) -> None:
        """Lift the quota: the user may come back as another session's."""
        uid = self._uids.pop(session, None)
        self._limits.pop(session, None)
        self._active.discard(session)
        if uid is not None:
            with suppress(OSError):
                self._quotas.limit(uid, 0, 0)
                self._share()

    def _activate(self, session: str) -> None:
        self._active.add(session)
        share = self._share(newest=session)
        if any(part < least for part, least in zip(share, _LEAST, strict=True)):
            self._active.discard(session)
            self._share()
            raise NoDisk(
                f"the agent's disk is promised to {len(self._active)} active sessions: another one would get "
                f"{share[0] >> 20} MB and {share[1]} files of at least {_LEAST[0] >> 20} MB and {_LEAST[1]}; end "
                "sessions or set a larger SCRATCH_MB"
            )

    def _share(self, newest: str | None = None) -> tuple[int, int]:
        """Set the limits of all active sessions; return the share that each may have."""
        share = self._most
        for _ in range(2):
            used = {session: self._quotas.used(uid) for session, uid in self._uids.items()}
            share = self._equal_share(used)
            for session in sorted(self._active, key=lambda name: name == newest):
                limits = max(share[0], used[session][0]), max(share[1], used[session][1])
                if limits != self._limits.get(session):
                    self._quotas.limit(self._uids[session], *limits)
                    self._limits[session] = limits
        return share

    def _equal_share(self, used: dict[str, tuple[int, int]]) -> tuple[int, int]:
        seen = os.statvfs(self._state)
        totals = seen.f_blocks * seen.f_frsize, seen.f_files
        taken = (seen.f_blocks - seen.f_bfree) * seen.f_frsize, seen.f_files - seen.f_ffree
        shares = []
        for kind in (0, 1):
            active = [used[session][kind] for session in self._active]
            others = max(0, taken[kind] - sum(active))  # of the server, and of sessions at rest
            room = int(totals[kind] * (1 - _RESERVED_SHARE)) - others
            shares.append(min(self._most[kind], equal_share(room, active)))
        return shares[0], shares[1]


def equal_share(room: int, used: list[int]) -> int:
    """Return the largest share for which everybody's share, or what they use where that is more, fits into the room."""
    left = len(used)
    for have in sorted(used, reverse=True):
        if have * left <= room:
            break
        room -= have
        left -= 1
    return max(0, room // left) if left else 0
