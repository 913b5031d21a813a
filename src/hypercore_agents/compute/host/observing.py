"""The state of a sandbox, and why it ended: what its record, its exit file and the kernel show together."""

import signal
from typing import Any

from hypercore_agents.compute.base import Sandbox, SandboxState
from hypercore_agents.compute.host.identity import boot_id, is_alive
from hypercore_agents.compute.host.records import SandboxRecord
from hypercore_agents.compute.host.sandbox_directory import Exit, SandboxDirectory

_SIGNAL_NAMES = {member.value: member.name for member in signal.Signals}


def observe(directory: SandboxDirectory[Any], record: SandboxRecord) -> Sandbox:
    """Return the sandbox as it is now."""
    # The processes first: one that ends between the two looks has written its exit file by then.
    running = record.complete and any(process and is_alive(process) for process in (record.process, record.shim))
    ending = directory.read_exit()
    if running and ending is None:
        return Sandbox(record.agent_id, record.address, SandboxState.RUNNING, record.created_at)
    return Sandbox(
        record.agent_id,
        record.address,
        SandboxState.EXITED,
        record.created_at,
        exit_status=ending.exit_status if ending else None,
        exit_reason=_reason(directory, record, ending),
    )


def signal_name(number: int) -> str:
    """Return the name of a signal, such as SIGKILL, or its number."""
    return _SIGNAL_NAMES.get(number, f"signal {number}")


def _reason(directory: SandboxDirectory[Any], record: SandboxRecord, ending: Exit | None) -> str:
    if directory.is_foreign(record.origin):
        return f"this is a copy of its record, which belongs to {record.origin}"
    if ending is not None:
        return ending.reason(record.memory_mb)
    if not record.complete:
        return "its start was interrupted"
    same_boot = record.process is not None and record.process.boot == boot_id()
    return "its shim was killed, and the agent with it" if same_boot else "the host was restarted"
