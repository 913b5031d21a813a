"""The one way in which anything is undone: by a stop, by a failed start, or after whoever began it died.

It works from the record alone, finds every part missing or present, and may be called again after any failure. The
order makes that safe: shim and QEMU first, which takes network, namespaces and rules along; then the control groups
and the user; last the directory, whose record goes at the very end. Until then the sandbox is in `list`.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterable
from functools import partial

from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.host.identity import ProcessIdentity, held, identify, reap, send, wait_ended
from hypercore_agents.compute.host.users import AgentUsers, processes_of
from hypercore_agents.compute.microvm.records import Record, SandboxDirectory
from hypercore_agents.kit.linux import cgroups
from hypercore_agents.kit.linux.removal import remove_tree

_PATIENCE = 5.0
_GROUP_PATIENCE = 5.0


def destroy(directory: SandboxDirectory, record: Record, users: AgentUsers) -> None:
    """Kill all that belongs to the sandbox, make sure that it is gone, and remove what it left.

    Blocks. Raises SandboxError when something is left; it stays on record and the next call goes on from there.
    """
    try:
        _end(record)
        clear_groups(record.cgroups)
        if record.uid is not None:
            _kill_user(record)
            users.release(record.uid, directory.path)
        else:
            # A start that was cut off between the claim and its record.
            users.release_any(directory.path)
        with contextlib.suppress(FileNotFoundError):
            for path in directory.path.iterdir():
                if path != directory.record:
                    remove_tree(path)
            directory.record.unlink(missing_ok=True)
            directory.path.rmdir()
    except OSError as error:
        raise SandboxError(f"cannot remove all of {record.agent_id}: {error}") from error


def clear_groups(groups: Iterable[str]) -> None:
    """Kill what runs in control groups and remove them. Raises SandboxError or OSError."""
    groups = [*groups]
    deadline = time.monotonic() + _GROUP_PATIENCE
    while pids := cgroups.members(groups):
        if time.monotonic() > deadline:
            raise SandboxError(f"processes in {groups[0]} survive SIGKILL: {sorted(pids)[:10]}")
        for pid in pids:
            _kill(identify(pid), partial(_is_member, pid, groups))
    cgroups.remove(groups, patience=_GROUP_PATIENCE)


def _end(record: Record) -> None:
    """Let the shim kill QEMU and write down how it ended; kill both if it does not."""
    for number in (signal.SIGUSR1, signal.SIGKILL):
        with held(record.shim) as pidfd:
            if pidfd is None:
                break
            send(pidfd, number)
            wait_ended(pidfd, _PATIENCE)
    reap(record.shim)
    _kill(record.machine)
    with held(record.machine) as pidfd:
        if pidfd is not None:
            raise SandboxError(f"the virtual machine of {record.agent_id} survives SIGKILL")


def _kill_user(record: Record) -> None:
    """Kill what runs as the sandbox's user, which nobody else is."""
    deadline = time.monotonic() + _PATIENCE
    while pids := [*processes_of(record.uid or 0)]:
        if time.monotonic() > deadline:
            raise SandboxError(f"processes of {record.agent_id} survive SIGKILL: {pids[:10]}")
        for pid in pids:
            _kill(identify(pid), partial(_is_of, pid, record.uid or 0))


def _kill(identity: ProcessIdentity | None, still: Callable[[], bool] = lambda: True) -> None:
    """Kill a process that is `still` what it was looked up for, once a descriptor holds it."""
    with held(identity) as pidfd:
        if pidfd is not None and still():
            send(pidfd, signal.SIGKILL)
            wait_ended(pidfd, _PATIENCE)


def _is_member(pid: int, groups: list[str]) -> bool:
    return pid in cgroups.members(groups)


def _is_of(pid: int, uid: int) -> bool:
    return pid in processes_of(uid)
