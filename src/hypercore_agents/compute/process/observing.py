"""What is to be seen of a sandbox, and why it ended, for those who ask."""

import signal

from hypercore_agents.compute.base import Sandbox, SandboxState
from hypercore_agents.compute.host.identity import boot_id, is_alive
from hypercore_agents.compute.process.records import Exit, Record, SandboxDirectory


def observe(directory: SandboxDirectory, record: Record) -> Sandbox:
    """Return what the record, the kernel and the exit file say together."""
    # Life first, the exit file second: whoever ends in between has written it by then.
    running = any(process is not None and is_alive(process) for process in (record.agent, record.shim))
    ending = directory.read_exit()
    if running and ending is None:
        return Sandbox(record.agent_id, record.address, SandboxState.RUNNING, record.created_at)
    return Sandbox(
        record.agent_id,
        record.address,
        SandboxState.EXITED,
        record.created_at,
        exit_status=ending.status if ending else None,
        exit_reason=_reason(directory, record, ending),
    )


def _reason(directory: SandboxDirectory, record: Record, ending: Exit | None) -> str:
    if directory.is_foreign(record.origin):
        return f"this is a copy of its record, which belongs to {record.origin}"
    if ending is None:
        if record.agent is None:
            return "its start was cut off"
        return "its shim was killed, and it with it" if record.agent.boot == boot_id() else "the host was restarted"
    reason = f"ended with status {ending.status}"
    if ending.status < 0:
        number = -ending.status
        known = number in signal.valid_signals() and number in {member.value for member in signal.Signals}
        reason = f"killed by {signal.Signals(number).name if known else f'signal {number}'}"
    if ending.memory_kills:
        reason += f"; the kernel killed {ending.memory_kills} of its processes at the limit of {record.memory_mb} MB"
    return reason
