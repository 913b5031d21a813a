"""The directory of one sandbox: its record, its exit file, and the end of its output.

    <sandboxes>/<agent_id>/
        record.json   what the backend needs to find the sandbox again; written last, removed last
        exit          how the sandbox ended; the shim writes it in place, so it has its full size from the start
        log, log.1    the agent's output; the shim writes and bounds it

A record names the machine and the folder that it was written in (`origin`). A copy of a state folder holds records of
sandboxes that belong to the original: they are reported as exited, and removing one removes only the copied files.

Files are not synced to disk: after a power failure no process of a record is alive, and an unreadable record is treated
as a sandbox without known details.

Rejected: a database (every shim would need its driver, and two managers would need a server).
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from hypercore_agents.compute.host.records import SandboxRecord
from hypercore_agents.kit.linux.state_location import location_mark

EXIT_BYTES = 256
"""Size of the exit file, in bytes."""


class Exit(Protocol):
    """How a sandbox ended."""

    @property
    def exit_status(self) -> int | None:
        """The status that the backend reports (negative: a signal), None if unknown."""

    def reason(self, memory_mb: int) -> str:
        """Return why it ended, for people. `memory_mb` is the sandbox's memory limit."""


R = TypeVar("R", bound=SandboxRecord)


class SandboxDirectory(ABC, Generic[R]):
    """The directory of one sandbox. A backend's subclass adds its own files. All methods block."""

    record_type: type[R]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.agent_id = path.name
        self.record = path / "record.json"
        self.exit = path / "exit"
        self.log = path / "log"
        self.origin = location_mark(path.parent)

    @property
    @abstractmethod
    def user_owned(self) -> tuple[Path, ...]:
        """The files and folders that belong to the sandbox's user."""

    @abstractmethod
    def read_exit(self) -> Exit | None:
        """Return how the sandbox ended, None while it runs or if its shim was killed."""

    @classmethod
    def all_in(cls, sandboxes: Path) -> Iterator[Self]:
        """Yield the directory of every sandbox in a folder, in no order."""
        try:
            with os.scandir(sandboxes) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        yield cls(sandboxes / entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return

    def is_foreign(self, origin: str | None) -> bool:
        """Return whether a record with this origin was written on another machine or in another folder."""
        return origin is not None and origin != self.origin

    def create(self) -> None:
        """Create the directory and its files. Raises OSError; FileExistsError if it exists."""
        self.path.mkdir(mode=0o700)
        write_private(self.exit, b" " * EXIT_BYTES)

    def write(self, record: R) -> None:
        """Replace the record atomically. Raises OSError and then leaves the old record in place."""
        new = self.path / "record.new"
        try:
            write_private(new, record.to_json())
            new.replace(self.record)
        except OSError:
            with suppress(OSError):
                new.unlink()
            raise

    def read(self) -> R | None:
        """Return the record, or None without a directory. A missing or damaged record is replaced by a minimal one."""
        with suppress(FileNotFoundError, NotADirectoryError, ValueError):
            return self._parse(self.record.read_bytes())
        with suppress(FileNotFoundError, NotADirectoryError):
            return self._minimal_record()
        return None

    def tail(self, limit: int) -> bytes:
        """Return the last `limit` bytes of the log, b"" if there is none."""
        return tail(self.log, limit)[0]

    def exit_content(self) -> Any:
        """Return the JSON value in the exit file, None while it has none."""
        try:
            return json.loads(self.exit.read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def _parse(self, content: bytes) -> R:
        """Return the record in a file's content, with this directory's agent. Raises ValueError.

        A foreign record is returned without anything that could be used to adopt or kill its processes.
        """
        record = replace(self.record_type.from_json(content), agent_id=self.agent_id)
        if self.is_foreign(record.origin):
            return self.record_type(self.agent_id, record.created_at, record.address, origin=record.origin)
        return record

    def _minimal_record(self) -> R:
        """Return a record with what the files themselves show: the user. Raises OSError if there is no directory."""
        first = self.user_owned[0]
        owner = first.stat().st_uid if first.exists() else os.geteuid()
        uid = None if owner == os.geteuid() else owner
        return self.record_type(self.agent_id, created_at=self.path.stat().st_mtime, uid=uid)


def tail(path: Path, limit: int) -> tuple[bytes, bool]:
    """Return the end of a bounded log (`shims.BoundedLog`), and whether it is the whole output."""
    # Newest first. A rotation between the two opens shows one file twice, which its inode reveals.
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
    """Write a file that only its owner can read; a symbolic link in its place is an error. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
