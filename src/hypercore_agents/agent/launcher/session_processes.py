"""The running processes of sessions: starts them, follows their startup, kills them and reports how they ended.

A kill is SIGKILL to the init of a process's pid namespace. That init is a child that only the launcher's loop reaps, so
its pid cannot be reused before the kill.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import time
from contextlib import suppress

from hypercore_agents.agent.launcher import sandbox
from hypercore_agents.agent.launcher.groups import LimitReached, SessionGroups, limit_fields
from hypercore_agents.agent.launcher.protocol import send_reply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hypercore_agents.agent.launcher.claude_cli import SessionCli
    from hypercore_agents.agent.launcher.folders import Folders
    from hypercore_agents.agent.launcher.reached_limits import LimitCounters

START_SECONDS = 20.0
"""A process that is not started is killed after this time without progress."""


class SessionLimits:
    """The limits of a session: memory and disk in MB, processes including threads, cores, files and folders on disk;
    `scratch_mb` for /tmp."""

    def __init__(
        self, *, memory_mb: int, processes: int, cores: float, disk_mb: int, files: int, scratch_mb: int
    ) -> None:
        self.memory_mb, self.processes, self.cores = memory_mb, processes, cores
        self.disk_mb, self.files, self.scratch_mb = disk_mb, files, scratch_mb


class _Process:
    """A process of a session. `intermediate` and `init` are children of the launcher; None: not started, or ended."""

    def __init__(
        self,
        session: str,
        reply_socket: socket.socket,
        report: socket.socket,
        intermediate: int,
        counters: LimitCounters,
    ) -> None:
        self.session, self.reply_socket, self.report = session, reply_socket, report
        self.intermediate: int | None = intermediate
        self.init: int | None = None
        self.listening: list[int] = []
        self.ready = False
        self.killed = False
        self.failure: str | None = None
        self.limit: LimitReached | None = None
        self.counters_at_start = counters
        self.deadline = time.monotonic() + START_SECONDS
        self.work_done: tuple[int, ...] = ()


class SessionProcesses:
    """All processes of sessions on this agent. Calls `session_idle` when the last process of a session has ended."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        folders: Folders,
        groups: SessionGroups,
        limits: SessionLimits,
        exposed: tuple[str, ...],
        cli: SessionCli,
        *,
        session_idle: Callable[[str], None],
    ) -> None:
        self._selector = selector
        self._folders = folders
        self._groups = groups
        self._limits = limits
        self._exposed = exposed
        self._cli = cli
        self._session_idle = session_idle
        self._processes: list[_Process] = []
        self._early_exits: dict[int, int] = {}
        """Exit codes of inits that ended before their report was read, by pid."""

    def __bool__(self) -> bool:
        return bool(self._processes)

    def sessions(self) -> set[str]:
        """Return the sessions that have processes."""
        return {process.session for process in self._processes}

    def all_started(self) -> bool:
        """Return whether no process is being started."""
        return all(process.ready for process in self._processes)

    def next_deadline(self) -> float | None:
        """Return the monotonic time of the next start deadline, None if no process is being started."""
        return min((process.deadline for process in self._processes if not process.ready), default=None)

    def start(
        self,
        request: dict[str, Any],
        session: str,
        reply_socket: socket.socket,
        stdio: list[int],
        *,
        share: float,
        reads_all: bool = False,
        work: Callable[[str, list[str]], int] | None = None,
        writes: bool = True,
    ) -> None:
        """Start a process as a session; the outcome goes to the reply socket. `reads_all` and `work`: `ProcessPlan`.

        Raises LimitReached, InsufficientDisk, OSError or ValueError.
        """
        folder, uid = self._folders.open(session, writes=writes)
        try:
            limits = self._limits
            scanned = self._folders.storage.method == "scan"
            plan = sandbox.ProcessPlan(
                request,
                folder,
                uid,
                stdio,
                groups=self._groups.ensure(session, uid, str(request.get("user", "")), share),
                exposed=self._exposed,
                cli=self._cli,
                memory_mb=limits.memory_mb,
                # Only a group reports that its limit was reached, so where there is one, its limit must be the lower.
                processes=2 * limits.processes if "pids" in self._groups.enforced else limits.processes,
                # A scan is late: a single endless file must fail before the session is killed.
                largest_file_mb=limits.disk_mb * 3 // 4 if scanned else limits.disk_mb,
                scratch_mb=limits.scratch_mb,
                oom_score=self._groups.oom_score,
                reads_all=reads_all,
                work=work,
            )
            report, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with child_end:
                counters = self._groups.counters(session)
                intermediate = sandbox.start(plan, child_end)
        except BaseException:
            if session not in self.sessions():
                self._folders.storage.deactivate(session)
            raise
        process = _Process(session, reply_socket, report, intermediate, counters)
        self._processes.append(process)
        self._selector.register(report, selectors.EVENT_READ, lambda: self._read_report(process))
        self._selector.register(reply_socket, selectors.EVENT_READ, lambda: self._kill(process))

    def kill_session(self, session: str, limit: LimitReached | None = None) -> None:
        """Kill all processes of a session; `limit` is reported as the reason."""
        for process in self._processes:
            if process.session == session:
                process.limit = limit or process.limit
                self._kill(process)

    def kill_all(self) -> None:
        """Kill all processes of all sessions."""
        for process in self._processes:
            self._kill(process)

    def kill_stalled(self) -> None:
        """Kill processes whose start made no progress for `START_SECONDS`."""
        for process in self._processes:
            if process.ready or time.monotonic() < process.deadline:
                continue
            work_done = _work_done(process.intermediate, process.init)
            if work_done != process.work_done and not process.killed:  # slow because the host is busy, not stalled
                process.work_done, process.deadline = work_done, time.monotonic() + START_SECONDS
                continue
            process.failure = process.failure or f"not started: no progress for {START_SECONDS:g} s"
            self._kill(process)

    def reaped(self, pid: int, code: int) -> None:
        """Handle the exit of a child process that is an intermediate process or an init."""
        for process in self._processes:
            if process.init == pid:
                self._ended(process, code)
                return
            if process.intermediate == pid:
                process.intermediate = None
                self._read_init_pid(process)
                if process.init is None:
                    self._ended(process, code)
                elif process.report.fileno() >= 0:
                    with suppress(OSError):
                        process.report.send(b"go")
                return
        self._early_exits[pid] = code

    def _kill(self, process: _Process) -> None:
        if not process.killed:
            process.killed = True
            with suppress(KeyError, ValueError):
                self._selector.unregister(process.reply_socket)
        for pid in (process.intermediate, process.init):
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _read_report(self, process: _Process) -> bool:
        """Read the next message of a process's start; return False if there is none now."""
        if process.report.fileno() < 0:  # the process ended in the same round of the loop
            return False
        try:
            data, descriptors = _receive_report(process.report)
        except BlockingIOError:
            return False
        process.listening += descriptors
        if data:
            message = json.loads(data)
            if "init" in message:
                process.init = message["init"]
                if process.killed:
                    self._kill(process)
                if process.init in self._early_exits:
                    self._ended(process, self._early_exits.pop(process.init))
            process.ready |= "ready" in message
            process.failure = process.failure or message.get("error")
            return True
        self._selector.unregister(process.report)
        process.report.close()
        if process.ready and process.failure is None and not process.killed:
            pid = _command_pid(process.init) if process.init else None
            send_reply(process.reply_socket, {"started": pid}, process.listening)
        process.ready = True
        for descriptor in process.listening:
            os.close(descriptor)
        process.listening = []
        return False

    def _read_init_pid(self, process: _Process) -> None:
        """Read the reports of an intermediate process that has ended, until init is known, if there is one."""
        if process.report.fileno() >= 0:
            process.report.setblocking(False)
        while process.init is None and self._read_report(process):
            pass

    def _ended(self, process: _Process, code: int) -> None:
        process.init = None
        if process.report.fileno() >= 0:
            process.report.setblocking(False)
            while self._read_report(process):
                pass
        if process.report.fileno() >= 0:
            self._selector.unregister(process.report)
            process.report.close()
        self._processes.remove(process)
        with suppress(KeyError, ValueError):
            self._selector.unregister(process.reply_socket)
        limit = process.limit
        if limit is None and (code or process.failure):
            limit = self._groups.reached_limit(process.session, process.counters_at_start)
        if process.failure is not None:
            send_reply(process.reply_socket, {"error": process.failure, **limit_fields(limit)})
        else:
            send_reply(process.reply_socket, {"exited": code if code >= 0 else 128 - code, **limit_fields(limit)})
        process.reply_socket.close()
        if process.session not in self.sessions():
            self._session_idle(process.session)


def _receive_report(report: socket.socket) -> tuple[bytes, list[int]]:
    """Return the next message and its descriptors, b"" at the end. Raises BlockingIOError."""
    try:
        data, descriptors, _, _ = socket.recv_fds(report, 4096, 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        # The other end closed before it read "go". The kernel reports that once, ahead of the messages it had sent.
        data, descriptors, _, _ = socket.recv_fds(report, 4096, 1, socket.MSG_CMSG_CLOEXEC)
    return data, list(descriptors)


def _work_done(*pids: int | None) -> tuple[int, ...]:
    """Return the page faults and clock ticks that processes have used (proc(5), stat fields 10, 12, 14 and 15)."""
    found: list[int] = []
    for pid in pids:
        with suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            found += [int(fields[number]) for number in (7, 9, 11, 12)]
    return tuple(found)


def _command_pid(init: int) -> int | None:
    """Return the pid, as the launcher sees it, of the only child of an init."""
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{init}/task/{init}/children") as file:
        return int(file.read().split()[0])
    return None
