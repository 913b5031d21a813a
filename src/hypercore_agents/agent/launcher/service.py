"""The loop of the launcher: one thread, one selector, no state but which session has which processes.

Everything that it waits for is in the selector: the server's requests, the answering sockets (whose closing kills), the
reports of processes that are being started, and SIGCHLD. A kill is SIGKILL to the init of a pid namespace, which is a
child that only this loop collects, so its number cannot mean anybody else.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
from contextlib import suppress

from hypercore_agents.agent.launcher import kernel, sandbox, workspace_files
from hypercore_agents.agent.launcher.disk_scan import EVERY_SECONDS, DiskWatch, measure
from hypercore_agents.agent.launcher.folders import Folders
from hypercore_agents.agent.launcher.groups import LimitReached, SessionGroups
from hypercore_agents.agent.launcher.protocol import (
    FOLDER,
    PACK_ENVIRONMENT,
    Malformed,
    pack_command,
    receive_request,
    send_answer,
)
from hypercore_agents.agent.launcher.reached_limits import Counted
from hypercore_agents.agent.launcher.storage import NoDisk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hypercore_agents.agent.launcher.claude_cli import SessionCli

START_SECONDS = 20.0
"""A process whose sandbox is not made is given up when it did nothing for so long."""
_LAST_PATIENCE = 10.0


class Limits:
    """What a session may use: memory and disk in MB, processes with their threads, cores, files and folders on disk;
    `scratch_mb` for /tmp."""

    def __init__(
        self, *, memory_mb: int, processes: int, cores: float, disk_mb: int, files: int, scratch_mb: int
    ) -> None:
        self.memory_mb, self.processes, self.cores = memory_mb, processes, cores
        self.disk_mb, self.files, self.scratch_mb = disk_mb, files, scratch_mb


class _Process:
    """A process of a session. `first` and `init` are children of the launcher, None when not there (any more)."""

    def __init__(self, session: str, answer: socket.socket, report: socket.socket, first: int) -> None:
        self.session, self.answer, self.report = session, answer, report
        self.first: int | None = first
        self.init: int | None = None
        self.listening: list[int] = []
        self.ready = False
        self.doomed = False
        self.failure: str | None = None
        self.limit: LimitReached | None = None
        self.counted: Counted | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self.work: tuple[int, ...] = ()


class Service:
    """Serves one agent server until it ends. `run` returns its exit status; then nothing of any session runs."""

    def __init__(
        self,
        channel: socket.socket,
        folders: Folders,
        groups: SessionGroups,
        limits: Limits,
        exposed: tuple[str, ...],
        cli: SessionCli,
    ) -> None:
        self._channel = channel
        self._folders = folders
        self._groups = groups
        self._limits = limits
        self._exposed = exposed
        self._cli = cli
        self._selector = selectors.DefaultSelector()
        self._processes: list[_Process] = []
        self._removals: dict[int, tuple[str, list[socket.socket]]] = {}
        self._waiting: dict[str, list[socket.socket]] = {}
        self._ended: dict[int, int] = {}
        scanned = folders.storage.method == "scan"
        self._disk = DiskWatch(folders.root, limits.disk_mb, limits.files) if scanned else None
        self._preparer: tuple[int, str] | None = None
        self._measurer: int | None = None
        self._measured = b""
        self._memory_watched = 0.0
        self._server = 0
        self._status: int | None = None

    def run(self, server: int, wakeup: int) -> int:
        """Serve until the server (a child of this process) has ended; SIGTERM and SIGINT are passed on to it."""
        self._server = server
        self._watch(wakeup, lambda: self._signals(os.read(wakeup, 512)))
        self._watch(self._channel, self._request)
        while self._status is None:
            self._prepare_spare()
            for key, _ in self._selector.select(self._patience()):
                key.data()
            self._give_up_late()
            self._watch_disk()
            self._watch_memory()
        self._end_all()
        return self._status

    def _watch(self, source: Any, handle: Callable[[], object]) -> None:
        self._selector.register(source, selectors.EVENT_READ, handle)

    def _patience(self) -> float | None:
        if not self._processes:
            return None
        waiting = [process.deadline for process in self._processes if not process.ready]
        return min(EVERY_SECONDS, max(0.0, min(waiting) - time.monotonic())) if waiting else EVERY_SECONDS

    def _watch_memory(self) -> None:
        if self._processes and time.monotonic() >= self._memory_watched + EVERY_SECONDS:
            self._memory_watched = time.monotonic()
            self._groups.watch()

    def _watch_disk(self) -> None:
        watch = self._disk
        if watch is None or not self._processes or self._measurer is not None or not watch.due():
            return
        running = {process.session for process in self._processes}
        folders = {session: os.path.join(self._folders.root, session) for session in running}
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                kernel.close_all_but({0, 1, 2, writing})
                measure(folders, (watch.bytes, watch.files), writing)
            finally:
                os._exit(0)
        os.close(writing)
        self._measurer = pid
        self._measured = b""
        self._watch(reading, lambda: self._hear_sizes(watch, reading))

    def _hear_sizes(self, watch: DiskWatch, reading: int) -> None:
        data = os.read(reading, 65536)
        self._measured += data
        if data:
            return
        self._selector.unregister(reading)
        os.close(reading)
        sizes = json.loads(self._measured or b"{}")
        for session, why in watch.too_large(sizes).items():
            _note(f"session {session} is over its limit on disk: it {why}; killed")
            for process in self._of(session):
                process.limit = LimitReached("disk", f"the session is over its limit on disk: it {why}")
                self._kill(process)

    def _prepare_spare(self) -> None:
        """Have a child make storage ready for the next new session, once nothing starts."""
        if self._preparer is not None or not all(process.ready for process in self._processes):
            return
        storage = self._folders.storage
        spare = storage.next_spare()
        if spare is None:
            return
        pid = os.fork()
        if pid == 0:
            try:
                kernel.close_all_but({0, 1, 2})
                storage.prepare(spare)
                os._exit(0)
            except BaseException as error:
                _note(f"cannot make storage ready: {error}")
            finally:
                os._exit(1)
        self._preparer = pid, spare

    def _give_up_late(self) -> None:
        for process in self._processes:
            if process.ready or time.monotonic() < process.deadline:
                continue
            work = _work_of(process.first, process.init)
            if work != process.work and not process.doomed:  # a host without a free processor, not a hang
                process.work, process.deadline = work, time.monotonic() + START_SECONDS
                continue
            process.failure = process.failure or f"not started: no progress for {START_SECONDS:g} s"
            self._kill(process)

    # requests

    def _request(self) -> None:
        try:
            received = receive_request(self._channel)
        except Malformed as error:
            _note(f"malformed request: {error}")
            return
        except OSError:
            received = None
        if received is None:
            self._selector.unregister(self._channel)
            return
        request, descriptors = received
        answer = socket.socket(fileno=descriptors.pop(0))
        try:
            self._serve(request, answer, descriptors)
        except LimitReached as error:
            send_answer(answer, {"error": str(error), "limit": [error.kind, str(error)]})
            answer.close()
        except NoDisk as error:
            send_answer(answer, {"error": str(error)[:2000], "full": "disk"})
            answer.close()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            send_answer(answer, {"error": f"{type(error).__name__}: {error}"[:2000]})
            answer.close()
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _serve(self, request: dict[str, Any], answer: socket.socket, descriptors: list[int]) -> None:
        what, session = request["do"], str(request["session"])
        if session in self._waiting:
            raise ValueError("the session is being removed")
        if what == "run":
            self._run(request, session, answer, descriptors)
        elif what == "assign":
            uid = self._folders.uid(session)
            if uid is not None:
                self._groups.assign(session, uid, str(request["user"]), _share(request))
            send_answer(answer, {"assigned": True})
            answer.close()
        elif what == "limits":
            send_answer(answer, _said(self._groups.reached(session)))
            answer.close()
        elif what == "pack":
            # The command is the launcher's own: with this right, any other one could read what no session may read.
            fixed = {"argv": pack_command(FOLDER), "environment": PACK_ENVIRONMENT}
            self._run(fixed | _whose(request), session, answer, descriptors, reads_all=True, writes=False)
        elif what == "files":
            argv = [str(part) for part in request["work"]]
            asked = {"argv": argv, "environment": {}} | _whose(request)
            writes = workspace_files.writes(argv)
            self._run(asked, session, answer, descriptors, work=workspace_files.work_on, writes=writes)
        elif what == "look":
            size = self._folders.look(session, [str(part) for part in request["path"]])
            send_answer(answer, {"exists": size is not None, "size": size or 0})
            answer.close()
        elif what == "usage":
            usage = self._folders.usage(session)
            counted = {} if usage is None else vars(usage)
            send_answer(answer, {"method": self._folders.storage.method, **counted})
            answer.close()
        elif what == "remove":
            self._waiting[session] = [answer]
            for process in self._of(session):
                self._kill(process)
            self._remove_if_empty(session)
        else:
            raise ValueError(f"do: {what!r} is none of run, pack, files, assign, limits, look, usage, remove")

    def _run(
        self,
        request: dict[str, Any],
        session: str,
        answer: socket.socket,
        stdio: list[int],
        *,
        reads_all: bool = False,
        work: Callable[[str, list[str]], int] | None = None,
        writes: bool = True,
    ) -> None:
        folder, uid = self._folders.open(session, writes=writes)
        try:
            self._start(request, session, answer, stdio, folder, uid, reads_all=reads_all, work=work)
        except BaseException:
            if not self._of(session):
                self._folders.storage.rest(session)
            raise

    def _start(
        self,
        request: dict[str, Any],
        session: str,
        answer: socket.socket,
        stdio: list[int],
        folder: str,
        uid: int,
        *,
        reads_all: bool,
        work: Callable[[str, list[str]], int] | None,
    ) -> None:
        limits = self._limits
        plan = sandbox.Plan(
            request,
            folder,
            uid,
            stdio,
            groups=self._groups.of(session, uid, str(request.get("user", "")), _share(request)),
            exposed=self._exposed,
            cli=self._cli,
            memory_mb=limits.memory_mb,
            # Where a group counts, it refuses first, and is asked afterwards whether it did: a user's limit is not.
            processes=2 * limits.processes if "pids" in self._groups.enforced else limits.processes,
            # A scan comes late: one endless file must end before the session has to.
            largest_file_mb=limits.disk_mb * 3 // 4 if self._disk else limits.disk_mb,
            scratch_mb=limits.scratch_mb,
            score=self._groups.score,
            reads_all=reads_all,
            work=work,
        )
        report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            counted = self._groups.counted(session)
            process = _Process(session, answer, report, sandbox.start(plan, theirs))
            process.counted = counted
        self._processes.append(process)
        self._watch(report, lambda: self._hear(process))
        self._watch(answer, lambda: self._kill(process))

    def _of(self, session: str) -> list[_Process]:
        return [process for process in self._processes if process.session == session]

    # processes

    def _hear(self, process: _Process) -> bool:
        """Hear what a process' beginning reports; False when there is nothing more to hear now."""
        if process.report.fileno() < 0:  # it ended while its news waited in the same round
            return False
        try:
            data, descriptors = _received(process.report)
        except BlockingIOError:
            return False
        process.listening += descriptors
        if data:
            said = json.loads(data)
            if "init" in said:
                process.init = said["init"]
                if process.doomed:
                    self._kill(process)
                if process.init in self._ended:
                    self._ended_with(process, self._ended.pop(process.init))
            process.ready |= "ready" in said
            process.failure = process.failure or said.get("error")
            return True
        self._selector.unregister(process.report)
        process.report.close()
        if process.ready and process.failure is None and not process.doomed:
            pid = _command_of(process.init) if process.init else None
            send_answer(process.answer, {"started": pid}, process.listening)
        process.ready = True
        for descriptor in process.listening:
            os.close(descriptor)
        process.listening = []
        return False

    def _kill(self, process: _Process) -> None:
        if not process.doomed:
            process.doomed = True
            with suppress(KeyError, ValueError):
                self._selector.unregister(process.answer)
        for pid in (process.first, process.init):
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _signals(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            with suppress(ProcessLookupError):
                os.kill(self._server, signal.SIGTERM)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._collected(pid, os.waitstatus_to_exitcode(status))

    def _collected(self, pid: int, code: int) -> None:
        if pid == self._server:
            self._status = code
            return
        if pid == self._measurer:
            self._measurer = None
            return
        if self._preparer is not None and pid == self._preparer[0]:
            self._folders.storage.prepared(self._preparer[1], usable=code == 0)
            self._preparer = None
            return
        if pid in self._removals:
            self._removed(pid, code)
            return
        for process in self._processes:
            if process.init == pid:
                self._ended_with(process, code)
                return
            if process.first == pid:
                process.first = None
                self._drain_report(process)
                if process.init is None:
                    self._ended_with(process, code)
                elif process.report.fileno() >= 0:
                    with suppress(OSError):
                        process.report.send(b"go")
                return
        self._ended[pid] = code

    def _drain_report(self, process: _Process) -> None:
        """Hear what `first` said before it ended, so that init is known if there is one."""
        if process.report.fileno() >= 0:
            process.report.setblocking(False)
        while process.init is None and self._hear(process):
            pass

    def _ended_with(self, process: _Process, code: int) -> None:
        process.init = None
        if process.report.fileno() >= 0:
            process.report.setblocking(False)
            while self._hear(process):
                pass
        if process.report.fileno() >= 0:
            self._selector.unregister(process.report)
            process.report.close()
        self._processes.remove(process)
        with suppress(KeyError, ValueError):
            self._selector.unregister(process.answer)
        reached = process.limit
        if reached is None and (code or process.failure):
            reached = self._groups.reached(process.session, process.counted)
        limit = _said(reached)
        if process.failure is not None:
            send_answer(process.answer, {"error": process.failure, **limit})
        else:
            send_answer(process.answer, {"exited": code if code >= 0 else 128 - code, **limit})
        process.answer.close()
        if not self._of(process.session):
            self._groups.release(process.session)
            if process.session not in self._waiting:
                self._folders.storage.rest(process.session)
            self._remove_if_empty(process.session)

    # removal

    def _remove_if_empty(self, session: str) -> None:
        if session not in self._waiting or self._of(session):
            return
        pid = os.fork()
        if pid == 0:
            try:
                kernel.close_all_but({0, 1, 2})
                self._folders.remove(session)
                os._exit(0)
            except BaseException as error:
                _note(f"cannot remove {session}: {error}")
            finally:
                os._exit(1)
        self._removals[pid] = (session, self._waiting[session])

    def _removed(self, pid: int, code: int) -> None:
        session, answers = self._removals.pop(pid)
        del self._waiting[session]
        if code == 0:
            self._folders.forget(session)
        for answer in answers:
            send_answer(answer, {"removed": True} if code == 0 else {"error": "not all of the folder could be removed"})
            answer.close()

    def _end_all(self) -> None:
        """Kill what sessions run and collect it; the kernel does the rest when this process ends."""
        for process in list(self._processes):
            self._kill(process)
        deadline = time.monotonic() + _LAST_PATIENCE
        while self._processes and time.monotonic() < deadline:
            for key, _ in self._selector.select(0.05):
                if key.fileobj is not self._channel:
                    key.data()
        self._groups.close()


def _share(request: dict[str, Any]) -> float:
    share = float(request.get("share", 1.0))
    if not 0 < share <= 1:
        raise ValueError("share: more than 0, at most 1")
    return share


def _said(limit: LimitReached | None) -> dict[str, list[str]]:
    return {} if limit is None else {"limit": [limit.kind, str(limit)]}


def _received(report: socket.socket) -> tuple[bytes, list[int]]:
    """Return the next message and its descriptors, b"" at the end. Raises BlockingIOError."""
    try:
        data, descriptors, _, _ = socket.recv_fds(report, 4096, 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        # The other end closed before it had read our "go". The kernel says so once, ahead of what it had sent.
        data, descriptors, _, _ = socket.recv_fds(report, 4096, 1, socket.MSG_CMSG_CLOEXEC)
    return data, list(descriptors)


def _work_of(*pids: int | None) -> tuple[int, ...]:
    """Return the page faults and clock ticks that processes have used (proc(5), stat fields 10, 12, 14 and 15)."""
    found: list[int] = []
    for pid in pids:
        with suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            found += [int(fields[number]) for number in (7, 9, 11, 12)]
    return tuple(found)


def _whose(request: dict[str, Any]) -> dict[str, Any]:
    return {name: request[name] for name in ("user", "share") if name in request}


def _command_of(init: int) -> int | None:
    """Return the pid, as the launcher counts, of the only child of an init."""
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{init}/task/{init}/children") as file:
        return int(file.read().split()[0])
    return None


def _note(text: str) -> None:
    print(json.dumps({"event": "launcher", "level": "warning", "message": text[:2000]}), file=sys.stderr, flush=True)  # noqa: T201
