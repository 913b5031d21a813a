"""What a sandbox's directory holds, and how it is read and written.

    <state_dir>/sandboxes/<agent_id>/
        record.json   what the backend must know to find the sandbox again; written last, removed last
        exit          how the agent ended; written by the shim
        log, log.1    what the agent printed; written by the shim, together at most `log_bytes`
        work/         the agent's home and state; the agent's own. Under a launcher: root's, with sessions' images
        tmp/          its temporary files; the agent's own

A record is complete (`agent` is set) before the first instruction of the agent runs; an incomplete one is a start that
was cut off. What is not particular to processes is `compute.host.folders`.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hypercore_agents.compute.host import folders
from hypercore_agents.compute.host.identity import ProcessIdentity

_PLAIN = ("agent_id", "created_at", "address", "uid", "memory_mb", "cores", "origin")


@dataclass(frozen=True)
class Record:
    """What is known of a sandbox. `created_at` is in Unix seconds, `cores` and `memory_mb` the limits that apply,
    if any. `origin` is the machine and folder that it was started in; None in records of earlier releases.
    """

    agent_id: str
    created_at: float
    address: str = ""
    uid: int | None = None
    memory_mb: int | None = None
    cores: int = 0
    cgroups: tuple[str, ...] = ()
    shim: ProcessIdentity | None = None
    agent: ProcessIdentity | None = None
    origin: str | None = None

    def to_json(self) -> bytes:
        """Return the file's content."""
        value = {
            **{name: getattr(self, name) for name in _PLAIN},
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
                **rest,
            }:
                # Earlier releases do not record `cores` and `origin`.
                return cls(
                    agent_id=agent_id,
                    created_at=created_at,
                    address=address,
                    uid=uid,
                    memory_mb=memory_mb,
                    cores=counted if isinstance(counted := rest.get("cores"), int) else 0,
                    cgroups=tuple(str(path) for path in cgroups),
                    shim=ProcessIdentity.from_json(shim),
                    agent=ProcessIdentity.from_json(agent),
                    origin=origin if isinstance(origin := rest.get("origin"), str) else None,
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


class SandboxDirectory(folders.Folder[Record]):
    """The directory of one sandbox. All methods block."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.work = path / "work"
        self.temporary = path / "tmp"
        self.images = self.work / "images"

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
        owner = self.work.stat().st_uid if self.work.exists() else os.geteuid()
        uid = None if owner == os.geteuid() else owner
        return Record(self.agent_id, created_at=self.path.stat().st_mtime, uid=uid)

    def create(self) -> None:
        """Make the directory and what is in it. Raises OSError; FileExistsError when it is there already."""
        super().create()
        for private in (self.work, self.temporary):
            private.mkdir(mode=0o700)

    def give_to(self, uid: int) -> None:
        """Let the agent's user pass through the directory, not look, and own what is the agent's. Raises OSError."""
        self.path.chmod(0o711)
        for private in (self.work, self.temporary):
            os.chown(private, uid, uid)

    def read_exit(self) -> Exit | None:
        """Return how the agent ended, None while it has not or where nobody was left to see it."""
        match self.ending():
            case {"status": int(status), "memory_kills": int(memory_kills), "clean": bool(clean)}:
                return Exit(status, memory_kills, clean)
        return None


def directories(root: Path) -> Iterator[SandboxDirectory]:
    """Yield the directory of every sandbox under `root`, in no order."""
    return folders.directories(root, SandboxDirectory)
