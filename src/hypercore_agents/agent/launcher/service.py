"""The launcher's loop: receives the server's requests, starts and ends processes of sessions, and reaps children.

One thread and one selector. The loop waits for the server's requests, the reply sockets (closing one kills its
process), the reports of processes that are being started, workers' output and SIGCHLD. Its only state is which session
has which processes. Work that blocks runs in `workers`.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from contextlib import suppress

from hypercore_agents.agent.launcher import workspace_files
from hypercore_agents.agent.launcher.disk_enforcement import DiskEnforcement
from hypercore_agents.agent.launcher.disk_scan import EVERY_SECONDS
from hypercore_agents.agent.launcher.groups import LimitReached, SessionGroups, limit_fields
from hypercore_agents.agent.launcher.protocol import (
    FOLDER,
    PACK_ENVIRONMENT,
    MalformedRequest,
    pack_command,
    receive_request,
    send_reply,
)
from hypercore_agents.agent.launcher.removals import Removals
from hypercore_agents.agent.launcher.session_processes import SessionLimits, SessionProcesses
from hypercore_agents.agent.launcher.storage import InsufficientDisk
from hypercore_agents.agent.launcher.workers import Workers, warn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hypercore_agents.agent.launcher.claude_cli import SessionCli
    from hypercore_agents.agent.launcher.folders import Folders

_END_SECONDS = 10.0
"""Maximum time for the processes of sessions to end after the server has ended."""


class Service:
    """Serves one agent server until it ends. `run` returns its exit status; by then all sessions' processes ended."""

    def __init__(
        self,
        channel: socket.socket,
        folders: Folders,
        groups: SessionGroups,
        limits: SessionLimits,
        exposed: tuple[str, ...],
        cli: SessionCli,
    ) -> None:
        self._channel = channel
        self._folders = folders
        self._groups = groups
        self._selector = selectors.DefaultSelector()
        self._workers = Workers()
        self._removals = Removals(folders, self._workers)
        self._processes = SessionProcesses(
            self._selector, folders, groups, limits, exposed, cli, session_idle=self._session_idle
        )
        self._disk: DiskEnforcement | None = None
        if folders.storage.method == "scan":
            self._disk = DiskEnforcement(
                folders.root,
                limits.disk_mb,
                limits.files,
                selector=self._selector,
                workers=self._workers,
                exceeded=self._disk_limit_exceeded,
            )
        self._oom_scores_adjusted = 0.0
        self._server = 0
        self._server_status: int | None = None

    def run(self, server: int, wakeup: int) -> int:
        """Serve until the server, a child of this process, has ended; forward SIGTERM and SIGINT to it."""
        self._server = server
        self._selector.register(wakeup, selectors.EVENT_READ, lambda: self._handle_signals(os.read(wakeup, 512)))
        self._selector.register(self._channel, selectors.EVENT_READ, self._receive)
        while self._server_status is None:
            self._prepare_spare()
            for key, _ in self._selector.select(self._select_timeout()):
                key.data()
            self._processes.kill_stalled()
            if self._disk is not None:
                self._disk.scan_if_due(self._processes.sessions())
            self._adjust_oom_scores()
        self._end_sessions()
        return self._server_status

    def _select_timeout(self) -> float | None:
        if not self._processes:
            return None
        deadline = self._processes.next_deadline()
        return EVERY_SECONDS if deadline is None else min(EVERY_SECONDS, max(0.0, deadline - time.monotonic()))

    def _adjust_oom_scores(self) -> None:
        if self._processes and time.monotonic() >= self._oom_scores_adjusted + EVERY_SECONDS:
            self._oom_scores_adjusted = time.monotonic()
            self._groups.adjust_oom_scores()

    def _prepare_spare(self) -> None:
        """Prepare storage for the next new session in a worker, while no process is being started."""
        storage = self._folders.storage
        if not self._processes.all_started() or (spare := storage.next_spare()) is None:
            return
        self._workers.start(
            lambda: storage.prepare_spare(spare),
            lambda usable: storage.spare_prepared(spare, usable=usable),
            purpose="prepare storage",
        )

    def _disk_limit_exceeded(self, session: str, reason: str) -> None:
        warn(f"session {session} exceeds its disk limit: {reason}; killed")
        self._processes.kill_session(session, LimitReached("disk", f"the session exceeds its disk limit: {reason}"))

    # requests

    def _receive(self) -> None:
        try:
            received = receive_request(self._channel)
        except MalformedRequest as error:
            warn(f"malformed request: {error}")
            return
        except OSError:
            received = None
        if received is None:
            self._selector.unregister(self._channel)
            return
        request, descriptors = received
        reply_socket = socket.socket(fileno=descriptors.pop(0))
        try:
            self._serve(request, reply_socket, descriptors)
        except LimitReached as error:
            _reply(reply_socket, {"error": str(error), **limit_fields(error)})
        except InsufficientDisk as error:
            _reply(reply_socket, {"error": str(error)[:2000], "full": "disk"})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _reply(reply_socket, {"error": f"{type(error).__name__}: {error}"[:2000]})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _serve(self, request: dict[str, Any], reply_socket: socket.socket, descriptors: list[int]) -> None:
        operation, session = request["do"], str(request["session"])
        if session in self._removals:
            raise ValueError("the session is being removed")
        if operation in ("run", "pack", "files"):
            self._start(operation, request, session, reply_socket, descriptors)
        elif operation == "assign":
            uid = self._folders.uid(session)
            if uid is not None:
                self._groups.assign(session, uid, str(request["user"]), _share(request))
            _reply(reply_socket, {"assigned": True})
        elif operation == "limits":
            _reply(reply_socket, limit_fields(self._groups.reached_limit(session)))
        elif operation == "look":
            size = self._folders.file_size(session, [str(part) for part in request["path"]])
            _reply(reply_socket, {"exists": size is not None, "size": size or 0})
        elif operation == "usage":
            usage = self._folders.usage(session)
            _reply(reply_socket, {"method": self._folders.storage.method, **(vars(usage) if usage else {})})
        elif operation == "remove":
            self._removals.request(session, reply_socket)
            self._processes.kill_session(session)
            if session not in self._processes.sessions():
                self._removals.start(session)
        else:
            raise ValueError(f"do: {operation!r} is none of run, pack, files, assign, limits, look, usage, remove")

    def _start(
        self,
        operation: str,
        request: dict[str, Any],
        session: str,
        reply_socket: socket.socket,
        stdio: list[int],
    ) -> None:
        share = _share(request)
        user = {"user": request.get("user", "")}
        if operation == "run":
            self._processes.start(request, session, reply_socket, stdio, share=share)
        elif operation == "pack":
            # A fixed command: with the right to read everything, another one could read what the session may not.
            packing = {"argv": pack_command(FOLDER), "environment": PACK_ENVIRONMENT, **user}
            self._processes.start(packing, session, reply_socket, stdio, share=share, reads_all=True, writes=False)
        else:
            arguments = [str(part) for part in request["work"]]
            self._processes.start(
                {"argv": arguments, "environment": {}, **user},
                session,
                reply_socket,
                stdio,
                share=share,
                work=workspace_files.work_on,
                writes=workspace_files.writes(arguments),
            )

    # children

    def _handle_signals(self, numbers: bytes) -> None:
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
            code = os.waitstatus_to_exitcode(status)
            if pid == self._server:
                self._server_status = code
            elif not self._workers.reaped(pid, code):
                self._processes.reaped(pid, code)

    def _session_idle(self, session: str) -> None:
        self._groups.release(session)
        if session in self._removals:
            self._removals.start(session)
        else:
            self._folders.storage.deactivate(session)

    def _end_sessions(self) -> None:
        """Kill and reap all processes of sessions; the kernel ends what is left when this process exits."""
        self._processes.kill_all()
        deadline = time.monotonic() + _END_SECONDS
        while self._processes and time.monotonic() < deadline:
            for key, _ in self._selector.select(0.05):
                if key.fileobj is not self._channel:
                    key.data()
        self._groups.close()


def _reply(reply_socket: socket.socket, reply: dict[str, Any]) -> None:
    with reply_socket:
        send_reply(reply_socket, reply)


def _share(request: dict[str, Any]) -> float:
    share = float(request.get("share", 1.0))
    if not 0 < share <= 1:
        raise ValueError("share: must be more than 0 and at most 1")
    return share
