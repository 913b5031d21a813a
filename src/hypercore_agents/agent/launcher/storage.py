"""Where sessions' files are and how much of them there may be: one contract, three ways to keep a session to its limit.

    image   each session has a file system of its own in a sparse file (`images`)          the kernel counts blocks
    quota   all sessions are on one file system with user quotas (`quotas`)                the kernel counts blocks
    scan    all sessions are on one file system; their folders are added up (`disk`)       inexact: names are counted

The first two count what the kernel counts: unlinked files that are open, mappings, descriptors on their way between
processes. The scan sees only what has a name, and only when it looks; it is what is left where there are neither loop
devices nor quotas, and `/health` and `doctor` say so.
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
"""What a session's folder holds from the beginning; each is the session's own."""


class NoDisk(OSError):
    """No room for another session's files; the message names what is full, with its numbers and its remedy."""


class Usage:
    """What a session has of its disk: bytes and files, used and allowed.

    `shared_by`: how many active sessions share the agent's disk, where that is why the session is allowed less than the
    limit of one session; else 0.
    """

    def __init__(self, used: int, limit: int, files: int, most_files: int, shared_by: int = 0) -> None:
        self.bytes, self.byte_limit = used, limit
        self.files, self.file_limit = files, most_files
        self.shared_by = shared_by


class Storage:
    """The contract, and its simplest form: plain folders that only a scan limits.

    A session is *active* while it runs something and so can write. `make` makes it active, `rest` and `wake` change
    that; only active sessions are counted with all that they may still take.
    """

    method: Method = "scan"

    def __init__(self, why: str) -> None:
        self.why = why
        """Why the kernel does not count here, as the end of "... because"."""

    def make(self, session: str, path: str, uid: int) -> None:
        """Make a folder for the files of a user, empty but for some of PARTS, all root's.

        Raises NoDisk or OSError; then nothing is left.
        """
        os.mkdir(path, 0o700)

    def next_spare(self) -> str | None:
        """Return the name of a spare that should be made ready for a session to come, None when none should."""
        return None

    def prepare(self, spare: str) -> None:
        """Make a spare. Blocks; for a child of the launcher. Raises OSError; then nothing is left of it."""

    def prepared(self, spare: str, *, usable: bool) -> None:
        """Note that the child has ended, and whether the next `make` may use the spare."""

    def wake(self, session: str) -> None:
        """Let the session write again. Raises NoDisk; then it must not run anything."""

    def rest(self, session: str) -> None:
        """Note that the session runs nothing any more."""

    def usage(self, session: str) -> Usage | None:
        """Return what the session uses, None where the kernel does not count it."""
        return None

    def remove(self, session: str, path: str) -> None:
        """Remove the session's files. Blocks; may be called in a child process. Raises OSError."""
        remove_tree(Path(path))

    def forget(self, session: str) -> None:
        """Let go of a session whose files were removed."""


def describe(method: str, why: str = "") -> str:
    """Return how sessions' files are limited, in one sentence for people."""
    if method == "image":
        return "exact: each session has a file system of its own (a loop device), whose size is its limit"
    if method == "quota":
        return "exact: each session's user has a quota of bytes and files"
    return f"inexact: only files that have a name are counted, about once a second, because {why}"
