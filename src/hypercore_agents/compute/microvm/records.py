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

What is not particular to VMs is `compute.host.folders`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hypercore_agents.compute.host import folders
from hypercore_agents.compute.host.identity import ProcessIdentity

_PLAIN = (
    "agent_id",
    "created_at",
    "address",
    "uid",
    "cores",
    "memory_mb",
    "disk_mb",
    "restored",
    "kept",
    "origin",
    "template",
    "template_mb",
)


@dataclass(frozen=True)
class Record:
    """What is known of a sandbox. `created_at` is in Unix seconds, `memory_mb` the VM's size class,
    `disk_mb` the size of its disk.

    `shim` is the process above QEMU, `machine` QEMU; `restored` says whether it came from a snapshot. `origin` is the
    machine and folder that it was started in; None in records of earlier releases.
    `template` is the instance that the VM is a clone of, whose `template_mb` are taken as long as one of its clones
    runs.
    """

    agent_id: str
    created_at: float
    address: str = ""
    uid: int | None = None
    cores: int = 0
    memory_mb: int = 0
    disk_mb: int = 0
    cgroups: tuple[str, ...] = ()
    shim: ProcessIdentity | None = None
    machine: ProcessIdentity | None = None
    restored: bool = False
    kept: bool = False
    origin: str | None = None
    template: str = ""
    template_mb: int = 0

    def to_json(self) -> bytes:
        """Return the file's content."""
        value = {
            **{name: getattr(self, name) for name in _PLAIN},
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
                **rest,
            }:
                # Earlier releases do not record `disk_mb`, `origin` and the template.
                return cls(
                    agent_id=agent_id,
                    created_at=created_at,
                    address=address,
                    uid=uid,
                    cores=cores,
                    memory_mb=memory_mb,
                    disk_mb=counted if isinstance(counted := rest.get("disk_mb"), int) else 0,
                    cgroups=tuple(str(path) for path in cgroups),
                    shim=ProcessIdentity.from_json(shim),
                    machine=ProcessIdentity.from_json(machine),
                    restored=restored,
                    kept=kept,
                    origin=origin if isinstance(origin := rest.get("origin"), str) else None,
                    template=str(rest.get("template", "")),
                    template_mb=counted if isinstance(counted := rest.get("template_mb"), int) else 0,
                )
        raise ValueError("not a sandbox's record")


@dataclass(frozen=True)
class Exit:
    """How a VM ended: QEMU's status, the agent's if the VM told it, and kills at the memory limit."""

    status: int
    agent: int | None
    memory_kills: int


class SandboxDirectory(folders.Folder[Record]):
    """The directory of one sandbox. All methods block."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.console = path / "console"
        self.scratch = path / "scratch"
        self.root = path / "root"

    def parse(self, content: bytes) -> Record:
        """Return the record in a file's content, as this sandbox's. Raises ValueError.

        Of a sandbox that belongs elsewhere nothing is returned by which it could be adopted or killed.
        """
        record = replace(Record.from_json(content), agent_id=self.agent_id)
        if self.is_foreign(record.origin):
            return Record(self.agent_id, record.created_at, record.address, origin=record.origin)
        return record

    def guess(self) -> Record:
        """Return a record of what can be seen without one: the user. Raises OSError where there is no directory."""
        owner = self.scratch.stat().st_uid if self.scratch.exists() else 0
        return Record(self.agent_id, created_at=self.path.stat().st_mtime, uid=owner or None)

    def create(self) -> None:
        """Make the directory and what is in it. Raises OSError; FileExistsError when it is there already."""
        super().create()
        self.root.mkdir(mode=0o700)

    def read_exit(self) -> Exit | None:
        """Return how the VM ended, None while it has not or where nobody was left to see it."""
        match self.ending():
            case {"status": int(status), "agent": int() | None as agent, "memory_kills": int(memory_kills)}:
                return Exit(status, agent, memory_kills)
        return None

    def tail(self, limit: int) -> bytes:
        """Return the last `limit` bytes that the agent printed; before them, if there is room, the console's."""
        printed, complete = folders.tail(self.log, limit)
        if not complete or len(printed) >= limit:
            return printed
        return folders.tail(self.console, limit - len(printed))[0] + printed


def directories(root: Path) -> Iterator[SandboxDirectory]:
    """Yield the directory of every sandbox under `root`, in no order."""
    return folders.directories(root, SandboxDirectory)
