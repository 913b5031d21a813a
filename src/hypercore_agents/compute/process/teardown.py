"""The one way in which a sandbox is undone: by a stop, by a failed start, or after whoever began it died.

It works from the record alone, finds every part missing or present, and may be called again after any failure. The
order makes that safe: processes first, then what bounds and names them (control groups, the user), and last the
directory, whose record goes at the very end. Until then the sandbox is in `list`.

Who belongs to the sandbox is answered three ways, and the shim's own answer saves the other two in the usual case:
- the shim says "clean": it is the reaper of all descendants and had none left;
- the members of the sandbox's control groups (complete, unless the agent is root);
- all processes of its user, or, where it shares the manager's, those that carry AGENT_ID and AGENT_STATE_DIR in their
  environment (as good as a same-user agent lets it be: a process that wiped its environment after the shim was
  killed, without a control group, cannot be told from a stranger).
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.host.identity import boot_id, held, is_alive, process_status, reap, send, wait_ended
from hypercore_agents.compute.host.users import AgentUsers, processes_of
from hypercore_agents.compute.process.records import Record, SandboxDirectory
from hypercore_agents.compute.process.shim import stop_forks
from hypercore_agents.kit.linux import cgroups
from hypercore_agents.kit.linux.removal import remove_tree

_SHIM_PATIENCE = 5.0
_SWEEP_PATIENCE = 10.0
_GROUP_PATIENCE = 5.0
_EXEC_PATIENCE = 0.5


def destroy(directory: SandboxDirectory, record: Record, users: AgentUsers) -> None:
    """Kill all that belongs to the sandbox, make sure that it is gone, and remove what it left.

    Blocks, at most some twenty seconds and the time that deleting its files takes. Raises SandboxError when something
    could not be killed or removed; what is left stays on record and the next call goes on from there.
    """
    try:
        _end_shim(record)
        if not _known_clean(directory, record):
            _sweep(directory, record)
        clear_groups(record.cgroups)
        for path in (directory.work, directory.temporary):
            remove_tree(path)
        if record.uid is not None:
            users.release(record.uid, directory.path)
        _remove(directory)
    except OSError as error:
        raise SandboxError(f"cannot remove all of {record.agent_id}: {error}") from error


def clear_groups(groups: Iterable[str]) -> None:
    """Kill what runs in control groups and remove them. Raises SandboxError or OSError."""
    groups = [*groups]
    _kill_all(lambda: cgroups.members(groups), "in its control groups")
    cgroups.remove(groups, patience=_GROUP_PATIENCE)


def _end_shim(record: Record) -> None:
    """Let the shim kill the agent and all that came from it; kill the shim itself if it does not."""
    for number in (signal.SIGUSR1, signal.SIGKILL):
        with held(record.shim) as pidfd:
            if pidfd is None:
                break
            send(pidfd, number)
            wait_ended(pidfd, _SHIM_PATIENCE)
    reap(record.shim)


def _known_clean(directory: SandboxDirectory, record: Record) -> bool:
    if record.shim is not None and record.shim.boot != boot_id():
        return True
    ending = directory.read_exit()
    return ending is not None and ending.clean


def _sweep(directory: SandboxDirectory, record: Record) -> None:
    stop_forks([*record.cgroups])

    def belonging() -> set[int]:
        found = cgroups.members(record.cgroups)
        if record.agent is not None and is_alive(record.agent):
            found.add(record.agent.pid)
        if record.uid is not None:
            found.update(processes_of(record.uid))
        if record.uid is None or record.shim is None:
            found.update(_marked(directory, record))
        return found

    _kill_all(belonging, f"of {record.agent_id}")


def _marked(directory: SandboxDirectory, record: Record) -> set[int]:
    """Return the processes, not older than the shim, whose environment names this sandbox."""
    marks = {f"AGENT_ID={record.agent_id}".encode(), b"AGENT_STATE_DIR=" + os.fsencode(directory.work)}
    oldest = record.shim.started if record.shim else 0
    deadline = time.monotonic() + _EXEC_PATIENCE
    while True:
        found, undecided = set(), False
        for pid, environment in _environments(oldest):
            if marks <= set(environment.split(b"\0")):
                found.add(pid)
            # In the middle of an exec a process has none; it must not slip through just then.
            undecided |= not environment
        if not undecided or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def _environments(oldest: int) -> Iterator[tuple[int, bytes]]:
    """Yield the environments of processes that this one may look into and that started at `oldest` or later."""
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with suppress(OSError):
            status = process_status(int(name))
            if status and not status.ended and status.started >= oldest:
                # Threads of the kernel run no program and have no environment.
                os.readlink(f"/proc/{name}/exe")
                yield int(name), Path(f"/proc/{name}/environ").read_bytes()


def _kill_all(belonging: Callable[[], set[int]], what: str) -> None:
    """Kill the processes that `belonging` names, again and again until it names none."""
    deadline = time.monotonic() + _SWEEP_PATIENCE
    quiet = 0
    # Twice: in one look round, a process may hide behind a child that it left while it was not looked at.
    while quiet < 2:
        pids = belonging()
        if not pids:
            quiet += 1
            continue
        quiet = 0
        if time.monotonic() > deadline:
            raise SandboxError(f"{len(pids)} processes {what} survive SIGKILL: {sorted(pids)[:10]}")
        with ExitStack() as open_descriptors:
            pidfds: dict[int, int] = {}
            for pid in pids:
                with suppress(ProcessLookupError):
                    pidfds[pid] = os.pidfd_open(pid)
                    open_descriptors.callback(os.close, pidfds[pid])
            # Asked again: a pid that is still named is now held by its descriptor and cannot be a stranger.
            certain = belonging() & pidfds.keys()
            for pid in certain:
                send(pidfds[pid], signal.SIGKILL)
            for pid in certain:
                wait_ended(pidfds[pid], min(1.0, deadline - time.monotonic()))


def _remove(directory: SandboxDirectory) -> None:
    """Remove the sandbox's directory; its record goes last."""
    with suppress(FileNotFoundError):
        for path in directory.path.iterdir():
            if path != directory.record:
                remove_tree(path)
        directory.record.unlink(missing_ok=True)
        directory.path.rmdir()
