"""What a sandbox's directory holds, and how it is read and written.

    <state_dir>/sandboxes/<agent_id>/
        record.json   what the backend must know to find the sandbox again; written last, removed last
        exit          how the agent ended; written by the shim
        log, log.1    what the agent printed; written by the shim, together at most `log_bytes`
        work/         the agent's home and state; the agent's own
        tmp/          its temporary files; the agent's own

- A record is replaced atomically, so that a reader sees the old or the new one. It is complete (`agent` is
  set) before the first instruction of the agent runs; an incomplete one is a start that was cut off.
- `exit` has its full size from the beginning: the shim only overwrites it, which needs no free space, so that
  a full disk does not hide how an agent ended.
- No fsync: after a power cut no process of a record lives, and an unreadable record is handled as a sandbox
  of which nothing is known.

Rejected: a database (the shim would need its driver, and two managers a server).
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypercore_agents.compute.host.identity import ProcessIdentity

EXIT_BYTES = 256
"""Size of the exit file, in bytes."""


@dataclass(frozen=True)
class Record:
    """What is known of a sandbox. `created_at` is in Unix seconds, `memory_mb` the limit that applies, if any."""

    agent_id: str
    created_at: float
    address: str = ""
    uid: int | None = None
    memory_mb: int | None = None
    cgroups: tuple[str, ...] = ()
    shim: ProcessIdentity | None = None
    agent: ProcessIdentity | None = None

    def to_json(self) -> bytes:
        """Return the file's content."""
        value = {
            **{name: getattr(self, name) for name in ("agent_id", "created_at", "address", "uid", "memory_mb")},
            "cgroups": list(self.cgroups),
            "shim": self.shim and self.shim.to_json(),
            "agent": self.agent and self.agent.to_json(),
        }
        return json.dumps(value, indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes) -> "Record":
        """Return the record in a file's content. Raises ValueError when there is none in it."""
        match json.loads(content):
            case {
                "agent_id": str(agent_id),
                "created_at": float(created_at),
                "address": str(address),
                "uid": int() | None as uid,
                "memory_mb": int() | None as memory_mb,
                "cgroups": list(cgroups),
                "shim": shim,
                "agent": agent,
            }:
                return cls(
                    agent_id=agent_id,
                    created_at=created_at,
                    address=address,
                    uid=uid,
                    memory_mb=memory_mb,
                    cgroups=tuple(str(path) for path in cgroups),
                    shim=ProcessIdentity.from_json(shim),
                    agent=ProcessIdentity.from_json(agent),
                )
        raise ValueError("not a sandbox's record")


@dataclass(frozen=True)
class Exit:
    """How an agent ended. `clean`: the shim saw the last of the agent's processes go.

    `memory_kills` counts the processes that the kernel killed at the memory limit.
    """

    status: int
    memory_kills: int
    clean: bool


class SandboxDirectory:
    """The directory of one sandbox. All methods block."""

    def __init__(self, path: Path):
        self.path = path
        self.agent_id = path.name
        self.record = path / "record.json"
        self.exit = path / "exit"
        self.log = path / "log"
        self.older_log = path / "log.1"
        self.work = path / "work"
        self.temporary = path / "tmp"

    def create(self) -> None:
        """Make the directory and what is in it. Raises OSError; FileExistsError when it is there already."""
        self.path.mkdir(mode=0o700)
        for private in (self.work, self.temporary):
            private.mkdir(mode=0o700)
        _write(self.exit, b" " * EXIT_BYTES)

    def give_to(self, uid: int) -> None:
        """Let the agent's user pass through the directory, not look, and own what is the agent's. Raises OSError."""
        self.path.chmod(0o711)
        for private in (self.work, self.temporary):
            os.chown(private, uid, uid)

    def write(self, record: Record) -> None:
        """Replace the record. Raises OSError, and then the old record is as it was."""
        fresh = self.path / "record.new"
        try:
            _write(fresh, record.to_json())
            fresh.replace(self.record)
        except OSError:
            with suppress(OSError):
                fresh.unlink()
            raise

    def read(self) -> Record | None:
        """Return the record, None without a directory.

        For a directory whose record is missing or spoilt, one of what can still be seen: the user.
        """
        try:
            return replace(Record.from_json(self.record.read_bytes()), agent_id=self.agent_id)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            pass
        try:
            owner = self.work.stat().st_uid if self.work.exists() else os.geteuid()
            uid = None if owner == os.geteuid() else owner
            return Record(self.agent_id, created_at=self.path.stat().st_mtime, uid=uid)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_exit(self) -> Exit | None:
        """Return how the agent ended, None while it has not or where nobody was left to see it."""
        try:
            value: Any = json.loads(self.exit.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        match value:
            case {"status": int(status), "memory_kills": int(memory_kills), "clean": bool(clean)}:
                return Exit(status, memory_kills, clean)
        return None

    def tail(self, limit: int) -> bytes:
        """Return the last `limit` bytes of the log, b"" when there is none."""
        # Newest first: a rotation between the two opens shows one file twice, which its inode tells.
        parts: list[bytes] = []
        seen: set[int] = set()
        for path in (self.log, self.older_log):
            try:
                with path.open("rb") as file:
                    status = os.fstat(file.fileno())
                    if status.st_ino in seen or limit <= 0:
                        continue
                    seen.add(status.st_ino)
                    file.seek(max(0, status.st_size - limit))
                    part = file.read(limit)
            except FileNotFoundError:
                continue
            parts.insert(0, part)
            limit -= len(part)
        return b"".join(parts)


def directories(root: Path) -> Iterator[SandboxDirectory]:
    """Yield the directory of every sandbox under `root`, in no order."""
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield SandboxDirectory(root / entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
