"""The backend that runs agents as processes of this host.

Cores and memory are upper limits, not reservations: the defaults (4 cores, 8192 MB) work on a laptop, and overcommit is
the operator's choice. Disk space is limited per session by the agents' launchers; a start and every new session are
checked against the space that is free and not yet reserved (`admission.admit_disk`, and the launcher).

Rejected: adopting agents by becoming their parent (impossible), and one daemon beside the manager that is their parent
(one more thing to run, restart and secure); a shim per agent is such a daemon, without state that agents share.
"""

import asyncio
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hypercore_agents.compute.base import Capabilities, HostUsage, Sandbox, SandboxRefused, SandboxRequest
from hypercore_agents.compute.host import capacity, users
from hypercore_agents.compute.host.blocking_work import wait_until_done
from hypercore_agents.compute.host.host_backend import HostBackend
from hypercore_agents.compute.host.observing import observe
from hypercore_agents.compute.process.admission import admit_disk, check
from hypercore_agents.compute.process.command import (
    AgentCommand,
    LauncherProbe,
    chosen_command,
    installed_agent,
    probe_launcher,
)
from hypercore_agents.compute.process.launch import Launcher
from hypercore_agents.compute.process.records import ProcessDirectory, ProcessRecord
from hypercore_agents.kit.linux import cgroups
from hypercore_agents.kit.linux.disk_reservations import promised_in

_LOG_BYTES = 4 << 20


class ProcessBackend(HostBackend[ProcessDirectory]):
    """Runs each agent as a process under a shim, with its own user and control groups where the host allows it."""

    name = "process"
    directory_type = ProcessDirectory

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

        `command` starts the agent (default: this installation's `agent` command). `agent_uids` None: all agents run as
        the manager's user. `max_processes` limits the processes and threads of an agent, `log_bytes` its stored output,
        `session_disk_mb` the files of each session. `threads` is how many starts and removals run at the same time.
        `exposed` are paths that sessions may read besides the system's files. Raises SandboxRefused if this host cannot
        run agents.
        """
        if not sys.platform.startswith("linux") or not hasattr(os, "pidfd_open"):
            raise SandboxRefused("the process backend needs Linux 5.3 or newer; choose another COMPUTE_BACKEND")
        state_dir = state_dir.absolute()
        super().__init__(state_dir, threads)
        agent = installed_agent() if command is None else chosen_command(command)
        probe = _probe(agent, agent_uids, uid_claims, state_dir, installed=command is None)
        # A launcher gives the agent's user a view of the files in which all paths on the way are open.
        reads = [state_dir, *agent.reads] if probe.why_not is not None else []
        why_shared_user = users.why_no_separate_users(agent_uids, uid_claims, reads)
        own_users = why_shared_user is None
        self._sandboxes_mode = 0o711 if own_users else 0o700
        groups = cgroups.detect() if enforce_limits else None
        self._launcher = Launcher(
            command=agent,
            # Also if new agents get no user: the users of earlier sandboxes must be released.
            users=users.AgentUsers(agent_uids or users.AGENT_UIDS, uid_claims),
            own_users=own_users,
            groups=groups,
            scope=hashlib.sha256(os.fsencode(self._sandboxes)).hexdigest()[:8],
            processes=max_processes,
            log_bytes=log_bytes,
            separates_sessions=probe.why_not is None,
            exposed=tuple(exposed),
            session_disk_mb=session_disk_mb,
        )
        self.capabilities = _capabilities(why_shared_user, probe, groups)

    async def start(self, request: SandboxRequest) -> Sandbox:
        """Start the agent under its own shim; its address accepts connections at once."""
        check(request)
        await self._workers.run(self._make_directories)
        async with self._locks.hold(request.agent_id):
            work = self._workers.submit(self._start, request)
            try:
                sandbox, _ = await asyncio.shield(work)
            except asyncio.CancelledError:
                await wait_until_done(work)
                if work.exception() is None and work.result()[1]:
                    await self._destroy_abandoned(self._directory(request.agent_id))
                raise
            return sandbox

    async def usage(self) -> HostUsage:
        """Return what this host has, the limits that agents were given, and what is really free."""
        return await self._workers.run(self._usage)

    # The methods below block and run in threads.

    def _start(self, request: SandboxRequest) -> tuple[Sandbox, bool]:
        """Return the sandbox, and whether this call started it."""
        directory = self._directory(request.agent_id)
        record = directory.read()
        if record is not None and record.complete:
            return observe(directory, record), False
        if record is not None:
            # A manager died during this start, before the agent's first instruction.
            self._destroy(directory, record)
        if self.capabilities.exact_disk:
            admit_disk(self._sandboxes, self._images(), self._launcher.session_disk_mb)
        return observe(directory, self._launcher.launch(directory, request)), True

    def _destroy(self, directory: ProcessDirectory, record: ProcessRecord) -> None:
        self._launcher.undo(directory, record)

    def _usage(self) -> HostUsage:
        records = [record for record in (directory.read() for directory in self._directories()) if record]
        host = capacity.snapshot(self._sandboxes)
        return HostUsage(
            cores=capacity.cores(),
            cores_used=sum(record.cores for record in records),
            memory_mb=capacity.memory_mb(),
            memory_used_mb=sum(record.memory_mb for record in records),
            sandboxes=len(records),
            disk_mb=host.disk_mb,
            disk_used_mb=sum(promised_in(str(folder)) for folder in self._images()) >> 20,
            load=host.load,
            memory_free_mb=host.memory_free_mb,
            disk_free_mb=host.disk_free_mb,
        )

    def _images(self) -> Sequence[Path]:
        return [directory.images for directory in self._directories()]


def _probe(
    command: AgentCommand, uids: range | None, claims: Path, state_dir: Path, *, installed: bool
) -> LauncherProbe:
    """Find out whether this host can isolate sessions, and how the files of sessions are limited."""
    if not installed:
        return LauncherProbe("its command is not this installation's")
    why_not = users.why_no_separate_users(uids, claims, []) or users.why_no_session_users(uids or users.AGENT_UIDS)
    return LauncherProbe(why_not) if why_not is not None else probe_launcher(command, state_dir)


def _capabilities(why_shared_user: str | None, probe: LauncherProbe, groups: cgroups.Cgroups | None) -> Capabilities:
    why_not_separate = probe.why_not
    enforced = groups.enforced if groups else frozenset()
    if why_shared_user is None:
        # Without a control group RLIMIT_NPROC limits processes, because no one else has the agent's user.
        enforced |= {"pids"}
        isolation = "a process of the host with its own user, and a user for each of its sessions"
        if why_not_separate is None:
            isolation += (
                " in namespaces that reach only the gateway's model routes: "
                "they share the host's kernel and can read its programs"
            )
        else:
            isolation = (
                "a process of the host with its own user: it shares the kernel, the network and all files that every "
                f"user of the host can read; its sessions are not isolated, because {why_not_separate}"
            )
    else:
        isolation = (
            f"none but limits: a process of the host under the manager's own user, because {why_shared_user}; "
            "it can reach the host's and other agents' files and processes"
        )
    return Capabilities(
        isolation,
        separates_agents=not why_shared_user,
        separates_sessions=not why_not_separate,
        separates_network=not why_not_separate,
        enforced_limits=enforced,
        session_disk=probe.session_disk,
        exact_disk=probe.exact_disk,
    )
