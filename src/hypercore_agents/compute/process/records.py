"""The record, exit file and directory of a sandbox of this backend.

    <state_dir>/sandboxes/<agent_id>/
        record.json   what the backend needs to find the sandbox again; written last, removed last
        exit          how the agent ended; written by the shim
        log, log.1    the agent's output; written by the shim, at most `log_bytes` together
        work/         the agent's home and state, which it owns. Under a launcher: owned by root, with sessions' images
        tmp/          the agent's temporary files, which it owns

A record is complete (`agent` is set) before the agent executes its first instruction. An incomplete record belongs to a
start that was interrupted.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypercore_agents.compute.host.identity import ProcessIdentity
from hypercore_agents.compute.host.observing import signal_name
from hypercore_agents.compute.host.records import SandboxRecord
from hypercore_agents.compute.host.sandbox_directory import SandboxDirectory


@dataclass(frozen=True)
class ProcessRecord(SandboxRecord):
    """The record of an agent that is a process. `agent` is the agent's process, or its launcher's."""

    agent: ProcessIdentity | None = None

    @property
    def process(self) -> ProcessIdentity | None:
        """The agent's process."""
        return self.agent

    @property
    def complete(self) -> bool:
        """Whether the agent's process is known."""
        return self.agent is not None

    def own_fields(self) -> dict[str, Any]:
        """Return the agent's process."""
        return {"agent": self.agent and self.agent.to_json()}

    @classmethod
    def parse_own_fields(cls, value: Mapping[Any, Any]) -> dict[str, Any]:
        """Return the agent's process. Raises ValueError."""
        if "agent" not in value:
            raise ValueError("not the record of a process")
        return {"agent": ProcessIdentity.from_json(value["agent"])}


@dataclass(frozen=True)
class ProcessExit:
    """How an agent ended. `memory_kills` counts the processes that the kernel killed at the memory limit.

    `clean`: the shim has seen every process of the agent end.
    """

    status: int
    memory_kills: int
    clean: bool

    @property
    def exit_status(self) -> int:
        """The agent's exit status."""
        return self.status

    def reason(self, memory_mb: int) -> str:
        """Return why the agent ended."""
        reason = f"killed by {signal_name(-self.status)}" if self.status < 0 else f"ended with status {self.status}"
        if self.memory_kills:
            reason += f"; the kernel killed {self.memory_kills} of its processes at the limit of {memory_mb} MB"
        return reason


class ProcessDirectory(SandboxDirectory[ProcessRecord]):
    """The directory of one sandbox. All methods block."""

    record_type = ProcessRecord

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.work = path / "work"
        self.temporary = path / "tmp"
        self.images = self.work / "images"

    @property
    def user_owned(self) -> tuple[Path, ...]:
        """The agent's folders."""
        return (self.work, self.temporary)

    def create(self) -> None:
        """Create the directory and its files. Raises OSError; FileExistsError if it exists."""
        super().create()
        for private in self.user_owned:
            private.mkdir(mode=0o700)

    def give_to(self, uid: int) -> None:
        """Let the agent's user own its folders and pass through the directory without listing it. Raises OSError."""
        self.path.chmod(0o711)
        for private in self.user_owned:
            os.chown(private, uid, uid)

    def read_exit(self) -> ProcessExit | None:
        """Return how the agent ended, None while it runs or if its shim was killed."""
        match self.exit_content():
            case {"status": int(status), "memory_kills": int(memory_kills), "clean": bool(clean)}:
                return ProcessExit(status, memory_kills, clean)
        return None
