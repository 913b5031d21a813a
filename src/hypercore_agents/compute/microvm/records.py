"""What a sandbox's directory holds, and how it is read and written.

    <state_dir>/microvm/sandboxes/<agent_id>/
        record.json        what the backend must know to find the sandbox again; written last, removed last
        exit               how the VM ended; written by the shim
        log, log.1         what the agent printed; written by the shim, together at most `log_bytes`
        console, console.1 what kernel and QEMU printed, the same
        scratch            the VM's disk; belongs to the VM's user
        root/              where the shim mounts QEMU's root, in a namespace of QEMU's own

- A record is replaced atomically. It is ahead of every step that leaves something outside of the directory, and it
  holds what admission counts: a VM that is being started has its room already. `kept` is set last: without it, the
  record is of a start that was cut off.
- No fsync: after a power cut no process of a record lives.

Rejected: a database (two managers would need a server).
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
    """What is known of a sandbox. `created_at` is in Unix seconds, `memory_mb` the VM's size class.

    `shim` is the process above QEMU, `machine` QEMU; `restored` says whether it came from a snapshot.
    """

    agent_id: str
    created_at: float
    address: str = ""
    uid: int | None = None
    cores: int = 0
    memory_mb: int = 0
    cgroups: tuple[str, ...] = ()
    shim: ProcessIdentity | None = None
    machine: ProcessIdentity | None = None
    restored: bool = False
    kept: bool = False

    def to_json(self) -> bytes:
        """Return the file's content."""
        plain = ("agent_id", "created_at", "address", "uid", "cores", "memory_mb", "restored", "kept")
        value = {
            **{name: getattr(self, name) for name in plain},
            "cgroups": [*self.cgroups],
            "shim": self.shim and self.shim.to_json(),
            "machine": self.machine and self.machine.to_json(),
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
                "cores": int(cores),
                "memory_mb": int(memory_mb),
                "cgroups": list(cgroups),
                "shim": shim,
                "machine": machine,
                "restored": bool(restored),
                "kept": bool(kept),
            }:
                return cls(
                    agent_id=agent_id,
                    created_at=created_at,
                    address=address,
                    uid=uid,
                    cores=cores,
                    memory_mb=memory_mb,
                    cgroups=tuple(str(path) for path in cgroups),
                    shim=ProcessIdentity.from_json(shim),
                    machine=ProcessIdentity.from_json(machine),
                    restored=restored,
                    kept=kept,
                )
        raise ValueError("not a sandbox's record")


@dataclass(frozen=True)
class Exit:
    """How a VM ended: QEMU's status, the agent's if the VM told it, and kills at the memory limit."""

    status: int
    agent: int | None
    memory_kills: int


class SandboxDirectory:
    """The directory of one sandbox. All methods block."""

    def __init__(self, path: Path):
        self.path = path
        self.agent_id = path.name
        self.record = path / "record.json"
        self.exit = path / "exit"
        self.log = path / "log"
        self.console = path / "console"
        self.scratch = path / "scratch"
        self.root = path / "root"

    def create(self) -> None:
        """Make the directory and what is in it. Raises OSError; FileExistsError when it is there already."""
        self.path.mkdir(mode=0o700)
        self.root.mkdir(mode=0o700)
        _write(self.exit, b" " * EXIT_BYTES)

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
        """Return the record, None without a directory; for a missing or spoilt record, one of what can be seen."""
        try:
            return replace(Record.from_json(self.record.read_bytes()), agent_id=self.agent_id)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            pass
        try:
            owner = self.scratch.stat().st_uid if self.scratch.exists() else 0
            return Record(self.agent_id, created_at=self.path.stat().st_mtime, uid=owner or None)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_exit(self) -> Exit | None:
        """Return how the VM ended, None while it has not or where nobody was left to see it."""
        try:
            value: Any = json.loads(self.exit.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        match value:
            case {"status": int(status), "agent": int() | None as agent, "memory_kills": int(memory_kills)}:
                return Exit(status, agent, memory_kills)
        return None

    def tail(self, limit: int) -> bytes:
        """Return the last `limit` bytes that the agent printed; before them, if there is room, the console's."""
        printed, complete = _tail(self.log, limit)
        if not complete or len(printed) >= limit:
            return printed
        return _tail(self.console, limit - len(printed))[0] + printed


def directories(root: Path) -> Iterator[SandboxDirectory]:
    """Yield the directory of every sandbox under `root`, in no order."""
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield SandboxDirectory(root / entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return


def _tail(path: Path, limit: int) -> tuple[bytes, bool]:
    """Return the end of a bounded log, and whether it is all that was ever printed."""
    # Newest first: a rotation between the two opens shows one file twice, which its inode tells.
    parts: list[bytes] = []
    seen: set[int] = set()
    for piece in (path, path.with_name(path.name + ".1")):
        try:
            with piece.open("rb") as file:
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
    return b"".join(parts), len(seen) < 2


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
