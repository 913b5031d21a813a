"""Disk quotas per session's user, in bytes and files, where the file system counts by user (microVMs).

All sessions share one disk. Fixed limits that add up to more than the disk would let some sessions take the space of
others. So the limits of all active sessions are set again whenever a session becomes active or inactive: each gets
`limit_mb`, or an equal share of the disk if that is less. A session that already uses more than its share keeps its
files and gets no more space. A session is refused, with the numbers, if its share would be below `_LEAST`.

Before a share is granted, all other limits are lowered to it and the usage is read again. Data written in between is
thus bounded by a limit that was counted.

Rejected: project quotas (a file's owner may change its project). Fixed limits whose sum fits: in a microVM for many
sessions each would get a few megabytes, though most sessions use none.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from contextlib import suppress

from hypercore_agents.agent.launcher.storage import InsufficientDisk, Storage, Usage

_MB = 1 << 20
_BLOCK = 1024
"""Unit of the limits in `struct if_dqblk` (quotactl(2), QIF_DQBLKSIZE)."""
_LEAST = 16 * _MB, 1000
"""Bytes and files below which a session is refused."""
_RESERVED_SHARE = 0.05
"""Part of the disk that is left to the agent's server and the file system itself."""
_GETQUOTA, _SETQUOTA, _XGETQSTAT = 0x800007, 0x800008, 0x5805
_STAT_FLAGS, _ENFORCED = 2, 2
"""Offset of `qs_flags` in `struct fs_quota_stat`, and its flag for users' limits."""
_USER = 0
_LIMITS = 1 | 4
_DQBLK = struct.Struct("=8QI4x")
_SYS_QUOTACTL_FD = 443
_libc = ctypes.CDLL(None, use_errno=True)


class UserQuotas:
    """quotactl(2) for the users of the file system that holds a folder. Linux 5.14."""

    def __init__(self, folder: str) -> None:
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def enforced(self) -> bool:
        """Return whether the file system enforces user quotas."""
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
        """Limit a user to so many bytes and files from now on; 0: no limit. Raises OSError."""
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


class QuotaStorage(Storage):
    """Sets and lifts the quotas of sessions' users. `limit_mb` and `files` are the maximum of one session."""

    method = "quota"

    def __init__(self, state: str, limit_mb: int, files: int, quotas: UserQuotas | None = None) -> None:
        super().__init__("")
        self._state = os.path.realpath(state)
        self._maximum = limit_mb * _MB, min(files, os.statvfs(self._state).f_files // 4)
        self._quotas = quotas or UserQuotas(self._state)
        self._uids: dict[str, int] = {}
        self._active: set[str] = set()
        self._limits: dict[str, tuple[int, int]] = {}

    def create(self, session: str, path: str, uid: int) -> None:
        """Create a folder and set its user's quota. Raises InsufficientDisk if the share is too small, or OSError."""
        self._uids[session] = uid
        try:
            self._grant_share(session)
            os.mkdir(path, 0o700)
        except BaseException:
            self.forget(session)
            raise

    def activate(self, session: str) -> None:
        """Grant the session its share again. Raises InsufficientDisk."""
        if session in self._uids and session not in self._active:
            self._grant_share(session)

    def deactivate(self, session: str) -> None:
        """Divide the session's unused share among the others."""
        if session in self._active:
            self._active.discard(session)
            with suppress(OSError):
                self._set_limits()

    def usage(self, session: str) -> Usage | None:
        """Return what the kernel counted for the session's user."""
        uid = self._uids.get(session)
        if uid is None or session not in self._limits:
            return None
        used, files = self._quotas.used(uid)
        limit, file_limit = self._limits[session]
        lowered = limit < self._maximum[0] or file_limit < self._maximum[1]
        return Usage(used, limit, files, file_limit, len(self._active) if lowered else 0)

    def forget(self, session: str) -> None:
        """Lift the quota: a later session may get the same user."""
        uid = self._uids.pop(session, None)
        self._limits.pop(session, None)
        self._active.discard(session)
        if uid is not None:
            with suppress(OSError):
                self._quotas.limit(uid, 0, 0)
                self._set_limits()

    def _grant_share(self, session: str) -> None:
        self._active.add(session)
        share = self._set_limits(newest=session)
        if any(part < least for part, least in zip(share, _LEAST, strict=True)):
            self._active.discard(session)
            self._set_limits()
            raise InsufficientDisk(
                f"the agent's disk is divided among {len(self._active)} active sessions: another one would get "
                f"{share[0] >> 20} MB and {share[1]} files of at least {_LEAST[0] >> 20} MB and {_LEAST[1]}; end "
                "sessions or set a larger SCRATCH_MB"
            )

    def _set_limits(self, newest: str | None = None) -> tuple[int, int]:
        """Set the limits of all active sessions, the newest last; return the share of each."""
        share = self._maximum
        for _ in range(2):
            used = {session: self._quotas.used(uid) for session, uid in self._uids.items()}
            share = self._share(used)
            for session in sorted(self._active, key=lambda name: name == newest):
                limits = max(share[0], used[session][0]), max(share[1], used[session][1])
                if limits != self._limits.get(session):
                    self._quotas.limit(self._uids[session], *limits)
                    self._limits[session] = limits
        return share

    def _share(self, used: dict[str, tuple[int, int]]) -> tuple[int, int]:
        disk = os.statvfs(self._state)
        totals = disk.f_blocks * disk.f_frsize, disk.f_files
        taken = (disk.f_blocks - disk.f_bfree) * disk.f_frsize, disk.f_files - disk.f_ffree
        shares = []
        for kind in (0, 1):
            active = [used[session][kind] for session in self._active]
            others = max(0, taken[kind] - sum(active))  # the server and inactive sessions
            capacity = int(totals[kind] * (1 - _RESERVED_SHARE)) - others
            shares.append(min(self._maximum[kind], equal_share(capacity, active)))
        return shares[0], shares[1]


def equal_share(capacity: int, used: list[int]) -> int:
    """Return the largest share for which the sum of max(share, usage) over all users is at most `capacity`."""
    users = len(used)
    for size in sorted(used, reverse=True):
        if size * users <= capacity:
            break
        capacity -= size
        users -= 1
    return max(0, capacity // users) if users else 0
