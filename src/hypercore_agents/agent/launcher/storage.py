"""Storage of sessions' files: the contract, and the three ways to hold a session to its disk limit.

    image   a file system per session in a sparse file (`disk_images`)                     the kernel counts blocks
    quota   one file system with user quotas for all sessions (`quotas`)                   the kernel counts blocks
    scan    one file system for all sessions; their folders are added up (`disk_scan`)     inexact: names are counted

With the first two, the kernel also counts unlinked files that are open, mappings, and descriptors in transit between
processes. The scan sees only files with a name, and only while it runs. It is used where neither loop devices nor
quotas exist; `/health` and `doctor` report it.
"""

from __future__ import annotations

import os
from pathlib import Path

from hypercore_agents.kit.linux.removal import remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Method = Literal["image", "quota", "scan"]


PARTS = ("home", "config", "workspace", "tmp")
"""The folders in a new session's folder; the session owns each."""


class InsufficientDisk(OSError):
    """The disk cannot hold another session's files; the message names the disk, the numbers and the remedy."""


class Usage:
    """Disk usage of a session: bytes and files, used and allowed.

    `shared_by` is the number of active sessions that share the agent's disk, if that lowers the session's limit; else
    0.
    """

    def __init__(self, used: int, limit: int, files: int, file_limit: int, shared_by: int = 0) -> None:
        self.bytes, self.byte_limit = used, limit
        self.files, self.file_limit = files, file_limit
        self.shared_by = shared_by


class Storage:
    """The contract, and its simplest implementation: plain folders that only a scan limits.

    A session is *active* while it has processes, which can write. `create` makes it active; `deactivate` and `activate`
    change that. An active session counts with its full limit, an inactive one with what it uses.
    """

    method: Method = "scan"

    def __init__(self, reason: str) -> None:
        self.reason = reason
        """Why the kernel does not count here, as the end of a sentence "... because"."""

    def create(self, session: str, path: str, uid: int) -> None:
        """Create a folder for the files of a user, empty or with some of PARTS, owned by root.

        Raises InsufficientDisk or OSError, and then leaves nothing behind.
        """
        os.mkdir(path, 0o700)

    def next_spare(self) -> str | None:
        """Return the name of a spare to prepare for a future session, None if no spare is wanted now."""
        return None

    def prepare_spare(self, spare: str) -> None:
        """Prepare a spare; runs in a worker and blocks. Raises OSError, and then leaves nothing behind."""

    def spare_prepared(self, spare: str, *, usable: bool) -> None:
        """Record that the worker has ended, and whether the next `create` may use the spare."""

    def activate(self, session: str) -> None:
        """Let the session write again. Raises InsufficientDisk; then it must not run anything."""

    def deactivate(self, session: str) -> None:
        """Record that the session has no processes."""

    def usage(self, session: str) -> Usage | None:
        """Return the session's usage, None where the kernel does not count it."""
        return None

    def remove(self, session: str, path: str) -> None:
        """Remove the session's files. Blocks; may run in a worker. Raises OSError."""
        remove_tree(Path(path))

    def forget(self, session: str) -> None:
        """Drop the records of a session whose files are removed."""


def describe(method: str, reason: str = "") -> str:
    """Return a sentence that says how the files of sessions are limited."""
    if method == "image":
        return "exact: each session has its own file system (a loop device), whose size is its limit"
    if method == "quota":
        return "exact: each session's user has a quota of bytes and files"
    return f"inexact: only files that have a name are counted, about once a second, because {reason}"
