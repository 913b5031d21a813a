"""The backend that runs agents as processes of this host.

All that it knows is in the sandboxes' directories and in the kernel; the object holds locks and threads, so that any
other object over the same state directory, in this process, in another or after a restart, continues where it was.

Cores and memory are upper limits, not reservations: the defaults (4 cores, 8192 MB) work on a laptop, and over-commit
is the operator's choice. Disk is limited per session by the agents' launchers, and what they promise is held against
what the host has (`admission.admit_disk`, and the launcher for each session).

Blocking work (files, /proc, starting processes) happens in a few threads of its own; waiting for an agent to end
happens on the event loop, by a pidfd, so that any number of stops may wait at once.

Rejected: adopting agents by becoming their parent (impossible), and a daemon beside the manager that is (one more thing
to run, restart and secure); a shim per agent is that daemon, without state shared between agents.
"""

import asyncio
import hashlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hypercore_agents.compute.base import (
    Capabilities,
    ComputeBackend,
    HostUsage,
    Sandbox,
    SandboxError,
    SandboxRefused,
    SandboxRequest,
)
from hypercore_agents.compute.host import capacity, users
from hypercore_agents.compute.host.blocking_work import Workers, settled
from hypercore_agents.compute.host.identity import held, send
from hypercore_agents.compute.host.locks import AgentLocks
from hypercore_agents.compute.host.request_checks import is_agent_id
from hypercore_agents.compute.process.admission import admit_disk, check
from hypercore_agents.compute.process.command import (
    AgentCommand,
    LauncherProbe,
    given_command,
    installed_agent,
    probe_launcher,
)
from hypercore_agents.compute.process.launch import Launcher
from hypercore_agents.compute.process.observing import observe
from hypercore_agents.compute.process.records import Record, SandboxDirectory, directories
from hypercore_agents.kit.linux import cgroups
from hypercore_agents.kit.linux.disk_reservations import promised_in

_LOG_BYTES = 4 << 20


class ProcessBackend(ComputeBackend):
    """Runs each agent as a process under a shim, with a user and control groups of its own where that is possible."""

    name = "process"

    def __init__(
        self,
        state_dir: Path,
        *,
        command: Sequence[str] | None = None,
        agent_uids: range | None = users.AGENT_UIDS,
        uid_claims: Path = users.CLAIMS,
        enforce_limits: bool = True,
        max_processes: int = 4096,
        log_bytes: int = _LOG_BYTES,
        session_disk_mb: int = 1024,
        threads: int = 8,
        exposed: Sequence[Path] = (),
    ) -> None:
        """Keep sandboxes under `state_dir`, and find out what this host allows.

        `command` starts the agent (default: this installation's `agent` command). `agent_uids` None: all run as the
        manager's user. `max_processes` limits an agent's processes and threads, `log_bytes` what is kept of its
        output, `session_disk_mb` limits each session's files, `threads` how many starts and removals happen at once,
        `exposed` what sessions may read besides the system's files. Raises SandboxRefused where nothing can run.
        """
        if not sys.platform.startswith("linux") or not hasattr(os, "pidfd_open"):
            raise SandboxRefused("the process backend needs Linux 5.3 or newer; choose another COMPUTE_BACKEND")
        state_dir = state_dir.absolute()
        self._sandboxes = state_dir / "sandboxes"
        chosen = installed_agent() if command is None else given_command(command)
        probed = _probe(chosen, agent_uids, uid_claims, state_dir, installed=command is None)
        together_because = probed.why_not
        # A launcher gives the agent's user a view of the files in which the way to them is open.
        reads = [] if together_because is None else [state_dir, *chosen.reads]
        shared_because = users.why_no_user_of_its_own(agent_uids, uid_claims, reads)
        self._own_users = shared_because is None
        groups = cgroups.detect() if enforce_limits else None
        self._launcher = Launcher(
            command=chosen,
            # Also where none are given any more: users of earlier sandboxes must be given back.
            users=users.AgentUsers(agent_uids or users.AGENT_UIDS, uid_claims),
            own_users=self._own_users,
            groups=groups,
            scope=hashlib.sha256(os.fsencode(self._sandboxes)).hexdigest()[:8],
            processes=max_processes,
            log_bytes=log_bytes,
            separates_sessions=together_because is None,
            exposed=tuple(exposed),
            session_disk_mb=session_disk_mb,
        )
        self.capabilities = _capabilities(shared_because, probed, groups)
        self._lock_files = state_dir / "locks"
        self._locks = AgentLocks(self._lock_files)
        self._workers = Workers(threads, "process-backend", self._sandboxes)

    async def start(self, request: SandboxRequest) -> Sandbox:
        """Start the agent under a shim of its own; its address takes connections at once."""
        check(request)
        await self._workers.run(self._make_directories)
        async with self._locks.hold(request.agent_id):
            work = self._workers.begin(self._start, request)
            try:
                sandbox, _ = await asyncio.shield(work)
            except asyncio.CancelledError:
                await settled(work)
                if work.exception() is None and work.result()[1]:
                    undone = self._workers.begin(self._destroy, request.agent_id)
                    await settled(undone)
                    # What could not be undone stays in `list`; the caller has gone and cannot be told.
                    undone.exception()
                raise
            return sandbox

    async def stop(self, agent_id: str, *, grace: float = 10.0) -> None:
        """Ask the agent to end, wait, kill all that it started, and remove its directory, groups and user."""
        if not is_agent_id(agent_id) or not await self._workers.run(self._exists, agent_id):
            return
        await self._workers.run(self._make_directories)
        async with self._locks.hold(agent_id):
            record = await self._workers.run(self._directory(agent_id).read)
            if record is not None:
                await _ask_to_end(record, grace)
                await self._workers.run(self._destroy, agent_id)

    async def inspect(self, agent_id: str) -> Sandbox | None:
        """Return what the record, the exit file and the kernel say together."""
        if not is_agent_id(agent_id):
            return None
        return await self._workers.run(self._observe, self._directory(agent_id))

    async def list(self) -> list[Sandbox]:
        """Return all sandboxes under the state directory, whichever manager started them."""
        return [*await self._workers.run(self._observe_all)]

    async def logs(self, agent_id: str, *, limit: int = 65536) -> bytes:
        """Return the end of what the agent printed; of its output the last half to all of `log_bytes` is kept."""
        if not is_agent_id(agent_id):
            return b""
        return await self._workers.run(self._directory(agent_id).tail, limit)

    async def usage(self) -> HostUsage:
        """Return what this host has, the limits that agents were given, and what is really free."""
        return await self._workers.run(self._usage)

    async def close(self) -> None:
        """End the threads; sandboxes go on running."""
        await self._workers.close()

    # What follows blocks and runs in threads.

    def _start(self, request: SandboxRequest) -> tuple[Sandbox, bool]:
        """Return the sandbox, and whether this call started it."""
        directory = self._directory(request.agent_id)
        record = directory.read()
        if record is not None and record.agent is not None:
            return observe(directory, record), False
        if record is not None:
            # A manager died in the middle of this start, before the agent's first instruction.
            self._launcher.undo(directory, record)
        if self.capabilities.exact_disk:
            admit_disk(self._sandboxes, self._images(), self._launcher.session_disk_mb)
        return observe(directory, self._launcher.launch(directory, request)), True

    def _destroy(self, agent_id: str) -> None:
        directory = self._directory(agent_id)
        record = directory.read()
        if record is not None:
            self._launcher.undo(directory, record)

    def _observe(self, directory: SandboxDirectory) -> Sandbox | None:
        record = directory.read()
        if record is not None and record.agent is None and self._locks.is_held(directory.agent_id):
            # Being started or removed; unless that has just ended, there is nothing to see yet.
            record = directory.read()
            if record is None or record.agent is None:
                return None
        return observe(directory, record) if record else None

    def _observe_all(self) -> tuple[Sandbox, ...]:
        found = (self._observe(directory) for directory in directories(self._sandboxes))
        return tuple(sorted((sandbox for sandbox in found if sandbox), key=lambda sandbox: sandbox.started_at))

    def _usage(self) -> HostUsage:
        records = [record for record in (found.read() for found in directories(self._sandboxes)) if record]
        host = capacity.look(self._sandboxes)
        return HostUsage(
            cores=capacity.cores(),
            cores_used=sum(record.cores for record in records),
            memory_mb=capacity.memory_mb(),
            memory_used_mb=sum(record.memory_mb or 0 for record in records),
            sandboxes=len(records),
            disk_mb=host.disk_mb,
            disk_used_mb=sum(promised_in(str(folder)) for folder in self._images()) >> 20,
            load=host.load,
            memory_free_mb=host.memory_free_mb,
            disk_free_mb=host.disk_free_mb,
        )

    def _images(self) -> Sequence[Path]:
        return [directory.images for directory in directories(self._sandboxes)]

    def _exists(self, agent_id: str) -> bool:
        return self._directory(agent_id).path.exists() or self._locks.is_held(agent_id)

    def _directory(self, agent_id: str) -> SandboxDirectory:
        return SandboxDirectory(self._sandboxes / agent_id)

    def _make_directories(self) -> None:
        try:
            _make_directory(self._sandboxes, 0o711 if self._own_users else 0o700)
            _make_directory(self._lock_files, 0o700)
        except OSError as error:
            raise SandboxError(f"cannot make {self._sandboxes}: {error.strerror}; check STATE_DIR") from error


def _probe(
    command: AgentCommand, uids: range | None, claims: Path, state_dir: Path, *, installed: bool
) -> LauncherProbe:
    """Find out whether sessions can be kept apart here, and how their files would be limited."""
    if not installed:
        return LauncherProbe("its command is not this installation's")
    why_not = users.why_no_user_of_its_own(uids, claims, []) or users.why_no_users_of_sessions(uids or users.AGENT_UIDS)
    return LauncherProbe(why_not) if why_not is not None else probe_launcher(command, state_dir)


def _capabilities(shared_because: str | None, probed: LauncherProbe, groups: cgroups.Cgroups | None) -> Capabilities:
    together_because = probed.why_not
    enforced = groups.enforced if groups else frozenset()
    if shared_because is None:
        # Where no control group limits processes, RLIMIT_NPROC does: the user is the agent's alone.
        enforced |= {"pids"}
        isolation = "a process of the host with a user of its own, its sessions with one each"
        if together_because is None:
            isolation += (
                " in namespaces of their own that reach the gateway's model routes and nothing else: "
                "they share the host's kernel and read its programs"
            )
        else:
            isolation = (
                "a process of the host with a user of its own: it shares the kernel, the network and what every user "
                f"of the host may read, and its sessions are not kept apart, because {together_because}"
            )
    else:
        isolation = (
            f"none but limits: a process of the host under the manager's own user, because {shared_because}; "
            "it can reach the host's and other agents' files and processes"
        )
    return Capabilities(
        isolation,
        separates_agents=not shared_because,
        separates_sessions=not together_because,
        separates_network=not together_because,
        enforced_limits=enforced,
        session_disk=probed.session_disk,
        exact_disk=probed.exact_disk,
    )


def _make_directory(path: Path, mode: int) -> None:
    """Make a directory, and those above it that are missing, with exactly this mode, whatever the umask is."""
    if not path.parent.exists():
        _make_directory(path.parent, mode)
    path.mkdir(exist_ok=True)
    path.chmod(mode)


async def _ask_to_end(record: Record, grace: float) -> None:
    """Send SIGTERM by way of the shim and wait, at most `grace` seconds, until agent and shim have ended."""
    with held(record.shim) as pidfd:
        if pidfd is None or grace <= 0:
            return
        send(pidfd, signal.SIGTERM)
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(pidfd, ended.set)
        try:
            async with asyncio.timeout(grace):
                await ended.wait()
        except TimeoutError:
            return
        finally:
            loop.remove_reader(pidfd)
