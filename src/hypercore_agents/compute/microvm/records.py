"""The record, exit file and directory of a sandbox of this backend.

    <state_dir>/microvm/sandboxes/<agent_id>/
        record.json        what the backend needs to find the sandbox again; written last, removed last
        exit               how the VM ended; written by the shim
        log, log.1         the agent's output; written by the shim, at most `log_bytes` together
        console, console.1 the output of the kernel and of QEMU, bounded in the same way
        scratch            the VM's disk, which the VM's user owns
        root/              the mount point of QEMU's root, in QEMU's own mount namespace

A record is written before every step of a start that creates something outside the directory, and it holds the figures
that admission counts, so a VM that is starting already counts. `detached` (`kept` in the file) is set last: a record
without it belongs to a start that was interrupted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypercore_agents.compute.host.identity import ProcessIdentity
from hypercore_agents.compute.host.observing import signal_name
from hypercore_agents.compute.host.records import SandboxRecord, integer
from hypercore_agents.compute.host.sandbox_directory import SandboxDirectory, tail


@dataclass(frozen=True)
class VmRecord(SandboxRecord):
    """The record of an agent in a VM. `memory_mb` is the VM's size class, `disk_mb` the size of its disk.

    `machine` is QEMU's process; `restored`: the VM was cloned from a template. `detached`: the VM runs on without the
    manager. `template` is the template instance of a clone; its `template_mb` stay in use while a clone of it runs.
    """

    disk_mb: int = 0
    machine: ProcessIdentity | None = None
    restored: bool = False
    detached: bool = False
    template: str = ""
    template_mb: int = 0

    @property
    def process(self) -> ProcessIdentity | None:
        """QEMU's process."""
        return self.machine

    @property
    def complete(self) -> bool:
        """Whether the VM runs on without the manager."""
        return self.detached

    def own_fields(self) -> dict[str, Any]:
        """Return the fields of a VM."""
        return {
            "disk_mb": self.disk_mb,
            "machine": self.machine and self.machine.to_json(),
            "restored": self.restored,
            "kept": self.detached,
            "template": self.template,
            "template_mb": self.template_mb,
        }

    @classmethod
    def parse_own_fields(cls, value: Mapping[Any, Any]) -> dict[str, Any]:
        """Return the fields of a VM. Raises ValueError."""
        match value:
            case {"machine": machine, "restored": bool(restored), "kept": bool(detached)}:
                # Earlier releases do not record the disk and the template.
                return {
                    "disk_mb": integer(value.get("disk_mb")),
                    "machine": ProcessIdentity.from_json(machine),
                    "restored": restored,
                    "detached": detached,
                    "template": str(value.get("template", "")),
                    "template_mb": integer(value.get("template_mb")),
                }
        raise ValueError("not the record of a virtual machine")


@dataclass(frozen=True)
class VmExit:
    """How a VM ended: QEMU's status, the agent's status if the VM reported it, and kills at the memory limit."""

    status: int
    agent: int | None
    memory_kills: int

    @property
    def exit_status(self) -> int | None:
        """The agent's status; if the VM did not report it, QEMU's status unless that is 0."""
        return self.agent if self.agent is not None else self.status or None

    def reason(self, memory_mb: int) -> str:
        """Return why the VM ended."""
        if self.agent is not None:
            return f"the agent {_ended(self.agent)}, and its virtual machine with it"
        reason = "its virtual machine restarted or powered off: the guest's kernel or first process failed"
        if self.status:
            reason = f"QEMU {_ended(self.status)}"
        if self.memory_kills:
            reason += f"; the host's kernel killed it at the limit of its control group ({memory_mb} MB and QEMU's own)"
        return reason


class VmDirectory(SandboxDirectory[VmRecord]):
    """The directory of one sandbox. All methods block."""

    record_type = VmRecord

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.console = path / "console"
        self.scratch = path / "scratch"
        self.root = path / "root"

    @property
    def user_owned(self) -> tuple[Path, ...]:
        """The VM's disk."""
        return (self.scratch,)

    def create(self) -> None:
        """Create the directory and its files. Raises OSError; FileExistsError if it exists."""
        super().create()
        self.root.mkdir(mode=0o700)

    def read_exit(self) -> VmExit | None:
        """Return how the VM ended, None while it runs or if its shim was killed."""
        match self.exit_content():
            case {"status": int(status), "agent": int() | None as agent, "memory_kills": int(memory_kills)}:
                return VmExit(status, agent, memory_kills)
        return None

    def tail(self, limit: int) -> bytes:
        """Return the last `limit` bytes of the agent's output, preceded by the console's if it is shorter."""
        printed, complete = tail(self.log, limit)
        if not complete or len(printed) >= limit:
            return printed
        return tail(self.console, limit - len(printed))[0] + printed


def _ended(status: int) -> str:
    return f"ended with status {status}" if status >= 0 else f"was killed by {signal_name(-status)}"
