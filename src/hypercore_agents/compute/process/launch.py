"""Starts the process of an agent under its shim. Blocks, so it runs in a thread.

    directory, user → record → groups → socket, secret's pipe → shim → record → agent forked → record → go → exec

The record is written before every step that creates something outside the directory, and is complete before the agent's
first instruction. If the manager dies in between, the shim and the forked agent exit when the manager's end of their
socket closes, and the record leads to the rest. If a step fails, `teardown.destroy` undoes all steps, as for a stop.

The agent's socket is bound and listening from the start: the address is known at once, no other program can take the
port, and early connections wait in its queue. The enrolment secret is written into a pipe and nowhere else.

Rejected: the agent chooses a port and reports it (a race, and one more message that a hostile agent could forge).
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypercore_agents.compute.base import SandboxError, SandboxRequest
from hypercore_agents.compute.host.identity import ProcessIdentity, identify
from hypercore_agents.compute.host.spawning import PACKAGE_FOLDER, open_listener, spawn_detached
from hypercore_agents.compute.host.teardown import clear_groups
from hypercore_agents.compute.host.users import AgentUsers, session_uids
from hypercore_agents.compute.process import shim
from hypercore_agents.compute.process.command import AgentCommand, with_launcher
from hypercore_agents.compute.process.records import ProcessDirectory, ProcessRecord
from hypercore_agents.compute.process.teardown import destroy
from hypercore_agents.kit.linux.cgroups import Cgroups, Limits

if TYPE_CHECKING:
    from hypercore_agents.compute.process.shim import Plan

_ANSWER_SECONDS = 30.0
_INHERITED = ("PATH", "LANG", "LC_ALL", "TZ")
RESERVED_NAMES = frozenset(
    {"AGENT_ID", "GATEWAY_URL", "AGENT_STATE_DIR", "AGENT_LISTEN_FD", "ENROLMENT_FD", "HOME", "TMPDIR"}
)
"""Variables that the backend sets; a request cannot."""


@dataclass(frozen=True)
class Launcher:
    """Starts agents. Its fields are the same for every start.

    `own_users`: each agent gets one of `users`. `groups` is None without limits. `separates_sessions`: agents start
    under a launcher, which starts as root and drops its privileges. `scope` distinguishes the control
    groups of this state directory from those of others. `processes` limits processes and threads, `log_bytes` the
    stored output of an agent, `session_disk_mb` the files of each session. `exposed` are paths that sessions may read
    besides the system's files.
    """

    command: AgentCommand
    users: AgentUsers
    own_users: bool
    groups: Cgroups | None
    scope: str
    processes: int
    log_bytes: int
    separates_sessions: bool = False
    exposed: tuple[Path, ...] = ()
    session_disk_mb: int = 1024

    def launch(self, directory: ProcessDirectory, request: SandboxRequest) -> ProcessRecord:
        """Start the sandbox and return its complete record.

        Raises SandboxError, SandboxRefused or InsufficientResources after undoing the start. Anything that cannot be
        undone stays on record.
        """
        start = _Start(self, directory, request)
        try:
            return start.run()
        except BaseException as error:
            self.undo(directory, start.record)
            if isinstance(error, OSError):
                raise SandboxError(f"cannot start {request.agent_id}: {error}") from error
            raise

    def undo(self, directory: ProcessDirectory, record: ProcessRecord) -> None:
        """Remove everything that a start, complete or not, has created. Raises SandboxError."""
        if not record.cgroups and self.groups:
            # The record was lost, or the start did not get that far. If groups exist, they have these paths.
            record = replace(record, cgroups=self.groups.paths(self.group_name(record.agent_id)))
        destroy(directory, record, self.users)

    def group_name(self, agent_id: str) -> str:
        """Return the name of an agent's control groups."""
        return f"hypercore-{self.scope}-{agent_id}"


class _Start:
    """One start. `record` always describes what has to be undone."""

    def __init__(self, launcher: Launcher, directory: ProcessDirectory, request: SandboxRequest) -> None:
        self.record = ProcessRecord(request.agent_id, created_at=time.time(), origin=directory.origin)
        self._launcher = launcher
        self._directory = directory
        self._request = request

    def run(self) -> ProcessRecord:
        directory, launcher = self._directory, self._launcher
        directory.create()
        if launcher.own_users:
            uid = launcher.users.claim(directory.path)
            self._note(uid=uid)
            directory.give_to(uid)
        self._make_groups()
        with (
            open_listener() as listener,
            _pipe_with(self._request.enrolment_secret) as secret,
            _control_sockets() as (ours, theirs),
        ):
            self._note(address=f"http://127.0.0.1:{listener.getsockname()[1]}")
            self._note(shim=self._spawn_shim(listener.fileno(), secret, theirs.fileno()))
            # The shim must hold the only copy of its end: that end closes when the shim dies.
            theirs.close()
            ours.send(self._plan())
            self._note(agent=self._receive_agent(ours))
            ours.send(b"go")
            self._receive(ours)
        return self.record

    def _note(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        self._directory.write(self.record)

    def _make_groups(self) -> None:
        groups, request = self._launcher.groups, self._request
        if groups is None:
            return
        name = self._launcher.group_name(request.agent_id)
        paths = groups.paths(name)
        # Groups of the same name exist if a state directory was deleted by hand.
        clear_groups(paths)
        self._note(
            cgroups=paths,
            memory_mb=request.memory_mb if "memory" in groups.enforced else None,
            cores=request.cores if "cores" in groups.enforced else 0,
        )
        groups.create(name, Limits(request.cores, request.memory_mb, self._launcher.processes))

    def _plan(self) -> bytes:
        directory, launcher = self._directory, self._launcher
        unlimited = launcher.groups is not None and "pids" in launcher.groups.enforced
        command, uid = [*launcher.command.arguments], self.record.uid
        sessions = session_uids(uid) if launcher.separates_sessions and uid is not None else None
        if sessions is not None and uid is not None:
            limited = launcher.groups is not None
            command = with_launcher(
                launcher.command,
                uid,
                sessions,
                directory.work,
                control_groups=limited,
                session_disk_mb=launcher.session_disk_mb,
                siblings=directory.path.parent,
                exposed=launcher.exposed,
            )
            uid = None
        plan: Plan = {
            "command": command,
            "environment": self._environment(),
            "directory": str(directory.work),
            "uid": uid,
            # The kernel counts processes per user, so this limit is useful only if the agent has its own user.
            "processes": None if unlimited or uid is None else launcher.processes,
            "cgroups": [*self.record.cgroups],
            "exit": str(directory.exit),
            "log": str(directory.log),
            "log_bytes": launcher.log_bytes,
        }
        return json.dumps(plan).encode()

    def _environment(self) -> dict[str, str]:
        directory, request = self._directory, self._request
        return {
            "PATH": os.defpath,
            **{name: os.environ[name] for name in _INHERITED if name in os.environ},
            **self._launcher.command.environment,
            **request.environment,
            **_marks(directory),
            "GATEWAY_URL": request.gateway_url,
            "AGENT_LISTEN_FD": str(shim.LISTEN),
            "ENROLMENT_FD": str(shim.ENROLMENT),
            "HOME": str(directory.work),
            "TMPDIR": str(directory.temporary),
        }

    def _spawn_shim(self, listener: int, secret: int, control: int) -> ProcessIdentity:
        return spawn_detached(
            [sys.executable, "-I", "-S", shim.__file__, self.record.agent_id, PACKAGE_FOLDER],
            {listener: shim.LISTEN, secret: shim.ENROLMENT, control: shim.CONTROL},
            _marks(self._directory),
            self.record.agent_id,
        )

    def _receive_agent(self, control: socket.socket) -> ProcessIdentity:
        match self._receive(control):
            case {"agent": int(pid)}:
                identity = identify(pid)
                if identity is not None:
                    return identity
        raise SandboxError(f"cannot start {self.record.agent_id}: its shim did not report the process that it started")

    def _receive(self, control: socket.socket) -> Any:
        message = control.recv(shim.PLAN_BYTES)
        answer = json.loads(message) if message else {"error": "its shim exited at once"}
        if "error" in answer:
            raise SandboxError(f"cannot start {self.record.agent_id}: {answer['error']}")
        return answer


def _marks(directory: ProcessDirectory) -> dict[str, str]:
    """Return the variables by which `teardown` recognises the processes of a sandbox."""
    return {"AGENT_ID": directory.agent_id, "AGENT_STATE_DIR": str(directory.work)}


@contextmanager
def _pipe_with(secret: str) -> Iterator[int]:
    """Give the reading end of a pipe that contains the secret and then ends."""
    reading, writing = os.pipe()
    try:
        try:
            # Never blocks: a secret is at most 128 characters (api.internal.EnrolRequest), a pipe holds a page.
            os.write(writing, secret.encode())
        finally:
            os.close(writing)
        yield reading
    finally:
        os.close(reading)


@contextmanager
def _control_sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(_ANSWER_SECONDS)
        yield ours, theirs
