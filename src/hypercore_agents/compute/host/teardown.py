"""Removes a sandbox: for a stop, after a failed start, or after the manager that started it died.

It works from the record alone, accepts that any part is missing, and may be called again after a failure. Processes go
first, then what limits and names them (control groups, the user), and last the directory, whose record is deleted at
the very end. Until then the sandbox is in `list`.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any

from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.host.identity import ProcessIdentity, is_alive, pidfd_of, reap, send_signal, wait_for_end
from hypercore_agents.compute.host.records import SandboxRecord
from hypercore_agents.compute.host.sandbox_directory import SandboxDirectory
from hypercore_agents.compute.host.users import AgentUsers, processes_of
from hypercore_agents.kit.linux import cgroups
from hypercore_agents.kit.linux.removal import remove_tree

_SHIM_SECONDS = 5.0
_KILL_SECONDS = 10.0
_GROUP_SECONDS = 5.0


def destroy(
    directory: SandboxDirectory[Any], record: SandboxRecord, users: AgentUsers, kill_remaining: Callable[[], None]
) -> None:
    """Kill all processes of the sandbox, confirm that they are gone, and remove its files, groups and user.

    `kill_remaining` kills the processes that the shim's end leaves. Blocks for up to about twenty seconds, and for the
    time that deleting the files takes. Raises SandboxError if something cannot be killed or removed; the rest stays on
    record and the next call continues.
    """
    try:
        _end_shim(record.shim)
        kill_remaining()
        clear_groups(record.cgroups)
        for path in directory.user_owned:
            remove_tree(path)
        if record.uid is not None:
            users.release(record.uid, directory.path)
        _remove(directory)
    except OSError as error:
        raise SandboxError(f"cannot remove all of {record.agent_id}: {error}") from error


def clear_groups(groups: Iterable[str]) -> None:
    """Kill the processes in control groups and remove the groups. Raises SandboxError or OSError."""
    groups = [*groups]
    kill_all(lambda: cgroups.members(groups), "in its control groups")
    cgroups.remove(groups, patience=_GROUP_SECONDS)


def processes_on_record(record: SandboxRecord) -> set[int]:
    """Return the running processes that the record leads to: by its control groups, its process and its user."""
    found = cgroups.members(record.cgroups)
    if record.process is not None and is_alive(record.process):
        found.add(record.process.pid)
    if record.uid is not None:
        found.update(processes_of(record.uid))
    return found


def kill_all(find: Callable[[], set[int]], what: str) -> None:
    """Kill the processes that `find` returns, repeatedly until it returns none. Raises SandboxError if some survive."""
    deadline = time.monotonic() + _KILL_SECONDS
    empty_rounds = 0
    # Two empty rounds: a single search can miss a process that forks and exits while the search runs.
    while empty_rounds < 2:
        pids = find()
        if not pids:
            empty_rounds += 1
            continue
        empty_rounds = 0
        if time.monotonic() > deadline:
            raise SandboxError(f"{len(pids)} processes {what} survive SIGKILL: {sorted(pids)[:10]}")
        with ExitStack() as open_descriptors:
            pidfds: dict[int, int] = {}
            for pid in pids:
                with suppress(ProcessLookupError):
                    pidfds[pid] = os.pidfd_open(pid)
                    open_descriptors.callback(os.close, pidfds[pid])
            # Search again: a pid that is found now, with its pidfd open, cannot have been reused by another process.
            certain = find() & pidfds.keys()
            for pid in certain:
                send_signal(pidfds[pid], signal.SIGKILL)
            for pid in certain:
                wait_for_end(pidfds[pid], min(1.0, deadline - time.monotonic()))


def _end_shim(shim: ProcessIdentity | None) -> None:
    """Let the shim kill the processes below it and record how they ended; kill the shim itself if it does not."""
    for number in (signal.SIGUSR1, signal.SIGKILL):
        with pidfd_of(shim) as pidfd:
            if pidfd is None:
                break
            send_signal(pidfd, number)
            wait_for_end(pidfd, _SHIM_SECONDS)
    reap(shim)


def _remove(directory: SandboxDirectory[Any]) -> None:
    """Remove the sandbox's directory, its record last."""
    with suppress(FileNotFoundError):
        for path in directory.path.iterdir():
            if path != directory.record:
                remove_tree(path)
        directory.record.unlink(missing_ok=True)
        directory.path.rmdir()
