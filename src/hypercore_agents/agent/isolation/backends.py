"""Where sessions live: whose their files and processes are, and how far they are kept apart.

Two answers to one contract. `SharedQuarters`: everything under the server's own user, which keeps nothing apart; what
an agent without the launcher has. `OwnQuarters`: each session under a user and in namespaces of its own, by the
launcher. Nothing else in the server knows which it is, but for `separate`.

A folder that was given up is not made anew by whoever is late (a file that was still coming when its session was
deleted): `prepare` and `run_as` refuse it, in the same step in which they ask for it.
"""

import asyncio
import hashlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from claude_agent_sdk import ClaudeAgentOptions, Transport

from hypercore_agents.agent.gateway.client import Unplaced
from hypercore_agents.agent.isolation.clean_transport import CleanTransport
from hypercore_agents.agent.isolation.model_proxy import ModelProxy
from hypercore_agents.agent.isolation.processes import background_of, children_and_siblings, kill_session
from hypercore_agents.agent.isolation.transport import LauncherTransport
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.agent.launcher import workspace_files
from hypercore_agents.agent.launcher.client import LauncherClient, Share
from hypercore_agents.agent.launcher.protocol import FOLDER, MODEL_ADDRESS, pack_command
from hypercore_agents.agent.launcher.storage import Usage
from hypercore_agents.kit.aio.tasks import Tasks

_PLACEHOLDER = "the-agent-server-adds-it"
"""What stands for the credential inside a session that never sees it."""


class BackgroundProcesses(NamedTuple):
    """What of a session runs besides its CLI: what descends from it, and what it or a tool let go of."""

    under_cli: bool
    detached: bool


class Isolation(ABC):
    """The contract. `separate`: sessions cannot reach one another."""

    separate: bool

    @abstractmethod
    def folder(self, session_id: str, user_id: str | None = None) -> SessionFolder:
        """Return the paths of a session as its own processes see them. `user_id` None: it has no user yet."""

    @abstractmethod
    async def assign(self, folder: SessionFolder, user_id: str) -> None:
        """Count what the session runs against its user's limits from now on. Raises LimitReached or LaunchFailed."""

    @abstractmethod
    async def limit_reached(self, folder: SessionFolder) -> str | None:
        """Say which limit the session reached since this was last asked, None when none. Raises LaunchFailed."""

    @abstractmethod
    async def prepare(self, folder: SessionFolder) -> None:
        """Make the session's folders. Safe to repeat. Raises Unplaced."""

    @abstractmethod
    async def file_size(self, folder: SessionFolder, path: str) -> int | None:
        """Return the size of a regular file below the session's folder, None when there is none."""

    async def usage(self, folder: SessionFolder) -> Usage | None:
        """Return what the session has of its disk, None where the kernel does not count it. Raises LaunchFailed."""
        return None

    @abstractmethod
    async def run_as(
        self,
        folder: SessionFolder,
        argv: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        timeout: float = 60.0,
    ) -> int:
        """Run a command in the session's folder with the session's rights and no more; return its exit status.

        `stdin`, `stdout`, `stderr` are descriptors (None: /dev/null). Raises TimeoutError, and then it is gone;
        Unplaced.
        """

    @abstractmethod
    async def pack(self, folder: SessionFolder, *, stdout: int, stderr: int, timeout: float) -> int:
        """Write the session's files as a tar stream, see `launcher.protocol.pack_command`. Raises as `run_as`."""

    @abstractmethod
    async def work_on_files(self, folder: SessionFolder, work: Sequence[str], *, channel: int, timeout: float) -> int:
        """Do `launcher.workspace_files` work with the session's rights; `channel` is a socket. Raises as `run_as`."""

    @abstractmethod
    def model_url(self) -> str:
        """Return the address at which the session's processes find the model routes."""

    @abstractmethod
    def credential(self, session_token: str) -> str:
        """Return what the session's CLI is told as its credential."""

    @abstractmethod
    def transport(self, options: ClaudeAgentOptions, folder: SessionFolder, files: Mapping[str, str]) -> Transport:
        """Return how the SDK reaches the session's CLI. `files` are written before its start."""

    @abstractmethod
    async def background_processes(self, folder: SessionFolder, pid: int) -> BackgroundProcesses:
        """Say whether anything of the session runs besides the CLI with this pid: what its tools left running."""

    @abstractmethod
    async def end(self, folder: SessionFolder, pid: int | None, transport: Transport | None) -> bool:
        """Kill whatever the session runs; say whether it is gone."""

    @abstractmethod
    async def remove(self, folder: SessionFolder) -> None:
        """Remove the session's folder; nothing of the session runs any more."""


class SharedUserIsolation(Isolation):
    """All sessions under this process's user, in folders of one state directory."""

    separate = False

    def __init__(self, state: Path, gateway_url: str) -> None:
        self._state = state
        self._gateway_url = gateway_url

    def folder(self, session_id: str, user_id: str | None = None) -> SessionFolder:
        """Return the paths of a session under the state directory."""
        return SessionFolder.of(self._state, session_id)

    async def assign(self, folder: SessionFolder, user_id: str) -> None:
        """Do nothing: sessions have no limits."""

    async def limit_reached(self, folder: SessionFolder) -> str | None:
        """Return None: sessions have no limits."""
        return None

    async def prepare(self, folder: SessionFolder) -> None:
        """Make the folders."""
        _require(folder)
        folder.create()

    async def file_size(self, folder: SessionFolder, path: str) -> int | None:
        """Look with the server's own rights."""
        target = folder.root / path
        return target.stat().st_size if target.is_file() and not target.is_symlink() else None

    async def run_as(
        self,
        folder: SessionFolder,
        argv: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        timeout: float = 60.0,
    ) -> int:
        """Run it as a child of the server."""
        _require(folder)
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else stdin,
            stdout=asyncio.subprocess.DEVNULL if stdout is None else stdout,
            stderr=asyncio.subprocess.DEVNULL if stderr is None else stderr,
            cwd=folder.workspace,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
        try:
            async with asyncio.timeout(timeout):
                return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def pack(self, folder: SessionFolder, *, stdout: int, stderr: int, timeout: float) -> int:
        """Pack with the server's own rights: it cannot read what its own user may not."""
        return await self.run_as(folder, pack_command(str(folder.root)), stdout=stdout, stderr=stderr, timeout=timeout)

    async def work_on_files(self, folder: SessionFolder, work: Sequence[str], *, channel: int, timeout: float) -> int:
        """Run it as a program of its own."""
        command = (sys.executable, "-I", "-m", workspace_files.__name__, str(folder.workspace), *work)
        return await self.run_as(folder, command, stdin=channel, stdout=channel, timeout=timeout)

    def model_url(self) -> str:
        """Return the gateway's own address."""
        return self._gateway_url

    def credential(self, session_token: str) -> str:
        """Return the session token: the CLI presents it itself."""
        return session_token

    def transport(self, options: ClaudeAgentOptions, folder: SessionFolder, files: Mapping[str, str]) -> Transport:
        """Write the files, and return a transport that starts the CLI as the SDK does."""
        for name, text in files.items():
            path = folder.root / name
            path.write_text(text, encoding="utf-8")
            path.chmod(0o600)
        return CleanTransport(replace(options))

    async def background_processes(self, folder: SessionFolder, pid: int) -> BackgroundProcesses:
        """Look for what carries the session's marks; something does as long as that cannot be told."""
        try:
            return BackgroundProcesses(*await asyncio.to_thread(background_of, folder.root, pid))
        except OSError:  # no descriptor is left: whoever ends a session must not fail at a look
            return BackgroundProcesses(True, True)

    async def end(self, folder: SessionFolder, pid: int | None, transport: Transport | None) -> bool:
        """Find and kill what carries the session's marks."""
        return await asyncio.to_thread(kill_session, folder.root, pid)

    async def remove(self, folder: SessionFolder) -> None:
        """Remove everything, once nothing stands in it any more."""
        await asyncio.to_thread(kill_session, folder.root, None)
        await folder.remove()


class PerSessionIsolation(Isolation):
    """Each session in a sandbox of its own, made and entered by the launcher."""

    separate = True

    def __init__(self, launcher: LauncherClient, gateway_url: str, tasks: Tasks, user_share: float = 1.0) -> None:
        self._launcher = launcher
        self._gateway_url = gateway_url
        self._tasks = tasks
        self._user_share = user_share

    def folder(self, session_id: str, user_id: str | None = None) -> SessionFolder:
        """Return the paths inside; they are the same for every session."""
        return SessionFolder(session_id, Path(FOLDER), user="" if user_id is None else _opaque(user_id))

    async def assign(self, folder: SessionFolder, user_id: str) -> None:
        """Have the launcher move what the session runs into its user's control group."""
        user = _opaque(user_id)
        if folder.user != user:
            await self._launcher.assign(folder.session_id, Share(user, self._user_share))
            folder.user = user

    async def limit_reached(self, folder: SessionFolder) -> str | None:
        """Ask the launcher, which reads the counters of the control groups."""
        found = await self._launcher.limit_reached(folder.session_id)
        return None if found is None else found.message

    def _share(self, folder: SessionFolder) -> Share:
        return Share(folder.user, self._user_share) if folder.user else Share()

    async def prepare(self, folder: SessionFolder) -> None:
        """Do no more: the launcher makes the folders with the first process."""
        _require(folder)

    async def file_size(self, folder: SessionFolder, path: str) -> int | None:
        """Let the launcher look, which follows no link."""
        return await self._launcher.look(folder.session_id, path)

    async def usage(self, folder: SessionFolder) -> Usage | None:
        """Ask the launcher."""
        return await self._launcher.usage(folder.session_id)

    async def run_as(
        self,
        folder: SessionFolder,
        argv: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        timeout: float = 60.0,
    ) -> int:
        """Run it in namespaces of its own, without any network."""
        _require(folder)
        return await self._launcher.run_as(
            folder.session_id,
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            timeout=timeout,
            share=self._share(folder),
        )

    async def pack(self, folder: SessionFolder, *, stdout: int, stderr: int, timeout: float) -> int:
        """Let the launcher pack, which reads what the session owns whatever its mode."""
        _require(folder)
        return await self._launcher.pack(
            folder.session_id, stdout=stdout, stderr=stderr, timeout=timeout, share=self._share(folder)
        )

    async def work_on_files(self, folder: SessionFolder, work: Sequence[str], *, channel: int, timeout: float) -> int:
        """Let the launcher fork it into the session's namespaces."""
        _require(folder)
        return await self._launcher.work_on_files(
            folder.session_id, work, channel=channel, timeout=timeout, share=self._share(folder)
        )

    def model_url(self) -> str:
        """Return the address inside of the session's network namespace."""
        return f"http://{MODEL_ADDRESS[0]}:{MODEL_ADDRESS[1]}"

    def credential(self, session_token: str) -> str:
        """Return a word without meaning: the server adds the credential outside."""
        return _PLACEHOLDER

    def transport(self, options: ClaudeAgentOptions, folder: SessionFolder, files: Mapping[str, str]) -> Transport:
        """Return a transport whose process the launcher starts."""
        model_proxy = ModelProxy(self._gateway_url, self._tasks)
        return LauncherTransport(
            replace(options), self._launcher, folder.session_id, model_proxy, files, share=self._share(folder)
        )

    async def background_processes(self, folder: SessionFolder, pid: int) -> BackgroundProcesses:
        """Look at the pid namespace: what its tools left is a child of the CLI's or of its init's."""
        return BackgroundProcesses(*children_and_siblings(pid))

    async def end(self, folder: SessionFolder, pid: int | None, transport: Transport | None) -> bool:
        """Kill the pid namespace; the launcher says when it is gone."""
        if isinstance(transport, LauncherTransport):
            await transport.end()
        return True

    async def remove(self, folder: SessionFolder) -> None:
        """Let the launcher remove it."""
        await self._launcher.remove(folder.session_id)


def _opaque(user_id: str) -> str:
    return hashlib.sha256(user_id.encode()).hexdigest()[:32]


def _require(folder: SessionFolder) -> None:
    if folder.released:
        raise Unplaced("the session is not on this agent any more; try again", retry_after=1)


def build_isolation(
    state: Path, gateway_url: str, launcher: LauncherClient | None, tasks: Tasks, user_share: float = 1.0
) -> Isolation:
    """Return the isolation that this process can have; `user_share` is the part of the agent that one user may use."""
    if launcher is not None:
        return PerSessionIsolation(launcher, gateway_url, tasks, user_share)
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    return SharedUserIsolation(Path(os.path.realpath(state)), gateway_url)
