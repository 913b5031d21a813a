"""What is to be seen of a sandbox, and why it ended, for those who ask."""

import signal

from hypercore_agents.compute.base import Sandbox, SandboxState
from hypercore_agents.compute.host.identity import boot_id, is_alive
from hypercore_agents.compute.microvm.records import Exit, Record, SandboxDirectory


def observe(directory: SandboxDirectory, record: Record) -> Sandbox:
    """Return what the record, the kernel and the exit file say together."""
    # Life first, the exit file second: whoever ends in between has written it by then.
    running = record.kept and any(process and is_alive(process) for process in (record.machine, record.shim))
    ending = directory.read_exit()
    if running and ending is None:
        return Sandbox(record.agent_id, record.address, SandboxState.RUNNING, record.created_at)
    return Sandbox(
        record.agent_id,
        record.address,
        SandboxState.EXITED,
        record.created_at,
        exit_status=_status(ending),
        exit_reason=_reason(directory, record, ending),
    )


def _status(ending: Exit | None) -> int | None:
    """Return the agent's status; where the VM did not tell it, QEMU's if that is telling."""
    if ending is None:
        return None
    return ending.agent if ending.agent is not None else ending.status or None


def _reason(directory: SandboxDirectory, record: Record, ending: Exit | None) -> str:
    if directory.is_foreign(record.origin):
        return f"this is a copy of its record, which belongs to {record.origin}"
    if ending is None:
        if not record.kept:
            return "its start was cut off"
        lived = record.machine is not None and record.machine.boot == boot_id()
        return "its shim was killed, and it with it" if lived else "the host was restarted"
    if ending.agent is not None:
        return f"the agent {_ended(ending.agent)}, and its virtual machine with it"
    reason = "its virtual machine restarted or powered off: the guest's kernel or first process gave up"
    if ending.status:
        reason = f"QEMU {_ended(ending.status)}"
    if ending.memory_kills:
        reason += (
            f"; the host's kernel killed it at the limit of its control group ({record.memory_mb} MB and QEMU's own)"
        )
    return reason


def _ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    known = {member.value: member.name for member in signal.Signals}
    return f"was killed by {known.get(-status, f'signal {-status}')}"
