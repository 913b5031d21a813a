"""The directory of a sandbox: its record, replaced atomically, how it ended, and the end of what it printed.

    <sandboxes>/<agent_id>/
        record.json   what the backend must know to find the sandbox again; written last, removed last
        exit          how it ended; written by the shim, in place: it has its full size from the beginning
        log, log.1    what it printed; written by the shim, bounded

A record names the machine and the folder that it was written in (`origin`). A copy of a state folder holds records of
sandboxes that are the original's: they are shown as exited, and removing one removes the copied files only.

What a record holds is the backend's own affair: it gives `Folder` the type of its records. No fsync: after a power cut
no process of a record lives, and an unreadable record is handled as a sandbox of which nothing is known.

Rejected: a database (a shim would need its driver, and two managers a server).
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from hypercore_agents.kit.linux.state_location import mark_of

EXIT_BYTES = 256
"""Size of the exit file, in bytes."""


class Recorded(Protocol):
    """What a record can do."""

    def to_json(self) -> bytes:
        """Return the file's content."""

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Return the record in a file's content. Raises ValueError when there is none in it."""


R = TypeVar("R", bound=Recorded)
F = TypeVar("F")


class Folder(ABC, Generic[R]):
    """The directory of one sandbox. All methods block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.agent_id = path.name
        self.record = path / "record.json"
        self.exit = path / "exit"
        self.log = path / "log"
        self.origin = mark_of(path.parent)

    def is_foreign(self, origin: str | None) -> bool:
        """Say whether a record of this origin was written on another machine or in another folder."""
        return origin is not None and origin != self.origin

    @abstractmethod
    def parse(self, content: bytes) -> R:
        """Return the record in a file's content, as this sandbox's. Raises ValueError."""

    @abstractmethod
    def guess(self) -> R:
        """Return a record of what can be seen without one. Raises OSError where there is no directory."""

    def create(self) -> None:
        """Make the directory and what is in it. Raises OSError; FileExistsError when it is there already."""
        self.path.mkdir(mode=0o700)
        write_private(self.exit, b" " * EXIT_BYTES)

    def write(self, record: R) -> None:
        """Replace the record. Raises OSError, and then the old record is as it was."""
        fresh = self.path / "record.new"
        try:
            write_private(fresh, record.to_json())
            fresh.replace(self.record)
        except OSError:
            with suppress(OSError):
                fresh.unlink()
            raise

    def read(self) -> R | None:
        """Return the record, None without a directory; for a missing or spoilt record, one of what can be seen."""
        with suppress(FileNotFoundError, NotADirectoryError, ValueError):
            return self.parse(self.record.read_bytes())
        with suppress(FileNotFoundError, NotADirectoryError):
            return self.guess()
        return None

    def ending(self) -> Any:
        """Return what the shim wrote into the exit file, None while there is nothing to be read in it."""
        try:
            return json.loads(self.exit.read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def tail(self, limit: int) -> bytes:
        """Return the last `limit` bytes of the log, b"" when there is none."""
        return tail(self.log, limit)[0]


def directories(root: Path, directory: Callable[[Path], F]) -> Iterator[F]:
    """Yield the directory of every sandbox under `root`, in no order."""
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield directory(root / entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return


def tail(path: Path, limit: int) -> tuple[bytes, bool]:
    """Return the end of a bounded log (`shims.BoundedLog`), and whether it is all that was ever printed."""
    # Newest first: a rotation between the two opens shows one file twice, which its inode tells.
    parts: list[bytes] = []
    seen: set[int] = set()
    for piece in (path, path.with_name(path.name + ".1")):
        try:
            with piece.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino in seen or limit <= 0 or (seen and not status.st_size):
                    continue
                seen.add(status.st_ino)
                file.seek(max(0, status.st_size - limit))
                part = file.read(limit)
        except FileNotFoundError:
            continue
        parts.insert(0, part)
        limit -= len(part)
    return b"".join(parts), len(seen) < 2


def write_private(path: Path, content: bytes) -> None:
    """Write a file that its owner alone may read; a link in its place is not followed. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
