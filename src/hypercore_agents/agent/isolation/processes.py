"""Finds and kills the processes of a session that runs under the server's own user.

A session's processes are its CLI, the CLI's descendants, and every process with one of the session's marks: the
session's folder in its environment (`CLAUDE_CONFIG_DIR`), or a working directory in that folder. The marks find
processes that a tool detached with `setsid`. A process that clears its environment, leaves the folder and detaches from
its ancestors is not found; only a PID namespace per session prevents that, which the launcher provides.

Signals go through pidfds that are checked after opening, so a signal never reaches a reused pid. The functions block:
call them off the event loop.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

_PROC = Path("/proc")


def kill_session(folder: Path, cli_pid: int | None, *, patience: float = 5.0) -> bool:
    """Send SIGKILL to all processes of the session; return whether all ended within `patience` seconds."""
    deadline = time.monotonic() + patience
    pause = 0.002
    while True:
        processes = _find(folder, cli_pid)
        if not processes:
            return True
        for pid, (_, started) in processes.items():
            _kill(pid, started=started)
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 2, 0.1)


def session_processes(folder: Path, cli_pid: int | None = None) -> set[int]:
    """Return the pids of the session's processes, without zombies."""
    return set(_find(folder, cli_pid))


def background_of(folder: Path, cli_pid: int) -> tuple[bool, bool]:
    """Return whether the session's CLI has descendants, and whether the session has processes detached from it.

    A process that this server started in the session's folder (a `tar`) counts as neither.
    """
    processes = _find(folder, cli_pid)
    own = os.getpid()
    below = {cli_pid}
    grown = True
    while grown:
        children = {pid for pid, (parent, _) in processes.items() if parent in below and pid not in below}
        below |= children
        grown = bool(children)
    own_commands = {pid for pid, (parent, _) in processes.items() if parent == own and own != 1}
    return len(below) > 1, bool(processes.keys() - below - own_commands)


def children_and_siblings(pid: int) -> tuple[bool, bool]:
    """Return whether a process has children, and whether it has siblings; True where that is unknown."""
    status = _status(pid)
    if status is None:
        return True, True
    try:
        return bool(_children(pid)), _children(status[0]) != {pid}
    except (OSError, ValueError):
        return True, True


def _children(pid: int) -> set[int]:
    return {
        int(child)
        for task in (_PROC / str(pid) / "task").iterdir()
        for child in (task / "children").read_text().split()
    }


def private_memory_mb(pid: int | str) -> float:
    """Return a process's resident memory that is not file-backed, in MB; 0 after its end."""
    try:
        fields = (_PROC / str(pid) / "statm").read_text().split()
    except OSError:
        return 0.0
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _find(folder: Path, cli_pid: int | None) -> dict[int, tuple[int, str]]:
    """Return parent and start time of every live process of the session, by pid."""
    own = os.getpid()
    marker = f"CLAUDE_CONFIG_DIR={folder}/".encode()
    inside = f"{folder}/"
    parents: dict[int, int] = {}
    started: dict[int, str] = {}
    members: set[int] = set()
    for entry in os.scandir(_PROC):
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        status = _status(pid)
        if pid == own or status is None:
            continue
        parents[pid], started[pid] = status
        if _has_variable(pid, marker) or _works_in(pid, inside):
            members.add(pid)
    if cli_pid is not None and cli_pid in parents and parents[cli_pid] == own:
        members.add(cli_pid)
    grown = True
    while grown:
        descendants = {pid for pid, parent in parents.items() if parent in members and pid not in members}
        members |= descendants
        grown = bool(descendants)
    return {pid: (parents[pid], started[pid]) for pid in members}


def _status(pid: int) -> tuple[int, str] | None:
    """Return parent and start time (proc(5), fields 4 and 22 of stat); None for a zombie or after its end."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    return None if fields[0] in "ZX" else (int(fields[1]), fields[19])


def _has_variable(pid: int, marker: bytes) -> bool:
    try:
        environment = (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return False
    return environment.startswith(marker) or b"\0" + marker in environment


def _works_in(pid: int, inside: str) -> bool:
    try:
        return f"{os.readlink(_PROC / str(pid) / 'cwd')}/".startswith(inside)
    except OSError:
        return False


def _kill(pid: int, *, started: str) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            status = _status(pid)
            if status is not None and status[1] == started:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)
