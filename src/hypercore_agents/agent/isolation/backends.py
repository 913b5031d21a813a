"""Where sessions run: the owner of their files and processes, and how they are isolated from each other.

Two implementations of one contract. `SharedUserIsolation` runs everything under the server's own user and isolates
nothing; an agent without the launcher uses it. `PerSessionIsolation` runs each session under its own user and in its
own namespaces, through the launcher. The rest of the server distinguishes them only by `separate`.

A late request (such as an upload that is still arriving) must not recreate the folder of a session that has left the
agent. So `prepare`, `run_as`, `pack` and `work_on_files` refuse a released folder, in the same step of the event loop
that starts the work.
"""

import asyncio
import hashlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

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
"""Replaces the credential inside a session, which never sees the real one."""
_COMMAND_SECONDS = 60.0


class BackgroundProcesses(NamedTuple):
    """Whether a session runs processes besides its CLI: descendants of the CLI, and processes detached from it."""

    under_cli: bool
    detached: bool


class RunOptions(TypedDict, total=False):
    """Options of `run_as`. The streams are descriptors, default /dev/null; `timeout` is in seconds, default 60."""

    stdin: int | None
    stdout: int | None
    stderr: int | None
    timeout: float


class Isolation(ABC):
    """The contract. `separate`: sessions cannot reach each other."""

    separate: bool

    @abstractmethod
    def folder(self, session_id: str, user_id: str | None = None) -> SessionFolder:
        """Return the paths of a session as its own processes see them. `user_id` None: it has no user yet."""

    @abstractmethod
    async def assign(self, folder: SessionFolder, user_id: str) -> None:
        """Count the session's processes against its user's limits from now on. Raises LimitReached or LaunchFailed."""

    @abstractmethod
    async def limit_reached(self, folder: SessionFolder) -> str | None:
        """Return which limit the session reached since the last call, None for none. Raises LaunchFailed."""

    @abstractmethod
    async def prepare(self, folder: SessionFolder) -> None:
        """Create the session's folders. Idempotent. Raises Unplaced."""

    @abstractmethod
    async def file_size(self, folder: SessionFolder, path: str) -> int | None:
        """Return the size of a regular file below the session's folder, None when there is none."""

    async def usage(self, folder: SessionFolder) -> Usage | None:
        """Return the session's use of its disk, None where the kernel does not count it. Raises LaunchFailed."""
        return None

    @abstractmethod
    async def run_as(self, folder: SessionFolder, argv: Sequence[str], **options: Unpack[RunOptions]) -> int:
        """Run a command in the session's folder with only the session's rights; return its exit status.

        Raises Unplaced, and TimeoutError after killing the command.
        """

    @abstractmethod
    async def pack(self, folder: SessionFolder, *, stdout: int, stderr: int, timeout: float) -> int:
        """Write the session's files as a tar stream, see `launcher.protocol.pack_command`. Raises like `run_as`."""

    @abstractmethod
    async def work_on_files(self, folder: SessionFolder, work: Sequence[str], *, channel: int, timeout: float) -> int:
        """Run `launcher.workspace_files` with the session's rights; `channel` is a socket. Raises like `run_as`."""

    @abstractmethod
    def model_url(self) -> str:
        """Return the address of the model routes for the session's processes."""

    @abstractmethod
    def credential(self, session_token: str) -> str:
        """Return the credential for the CLI's environment."""

    @abstractmethod
    def transport(self, options: ClaudeAgentOptions, folder: SessionFolder, files: Mapping[str, str]) -> Transport:
        """Return the SDK's transport to the session's CLI. `files` (name to text) are written before its start."""

    @abstractmethod
    async def background_processes(self, folder: SessionFolder, pid: int) -> BackgroundProcesses:
        """Return whether the session runs anything besides the CLI with this pid."""

    @abstractmethod
    async def end(self, folder: SessionFolder, pid: int | None, transport: Transport | None) -> bool:
        """Kill all processes of the session; return whether they have ended."""

    @abstractmethod
    async def remove(self, folder: SessionFolder) -> None:
        """Remove the session's folder. The caller has ended the session's processes."""


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
        """Create the folders."""
        _refuse_released(folder)
        folder.create()

    async def file_size(self, folder: SessionFolder, path: str) -> int | None:
        """Return the size, read with the server's own rights."""
        target = folder.root / path
        return target.stat().st_size if target.is_file() and not target.is_symlink() else None

    async def run_as(self, folder: SessionFolder, argv: Sequence[str], **options: Unpack[RunOptions]) -> int:
        """Run the command as a child of the server."""
        _refuse_released(folder)
        streams = (options.get("stdin"), options.get("stdout"), options.get("stderr"))
        stdin, stdout, stderr = (asyncio.subprocess.DEVNULL if stream is None else stream for stream in streams)
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=folder.workspace,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
        try:
            async with asyncio.timeout(options.get("timeout", _COMMAND_SECONDS)):
                return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def pack(self, folder: SessionFolder, *, stdout: int, stderr: int, timeout: float) -> int:
        """Pack with the server's own rights; files that its user may not read fail."""
        return await self.run_as(folder, pack_command(str(folder.root)), stdout=stdout, stderr=stderr, timeout=timeout)

    async def work_on_files(self, folder: SessionFolder, work: Sequence[str], *, channel: int, timeout: float) -> int:
        """Run it in a Python process of its own."""
        command = (sys.executable, "-I", "-m", workspace_files.__name__, str(folder.workspace), *work)
        return await self.run_as(folder, command, stdin=channel, stdout=channel, timeout=timeout)

    def model_url(self) -> str:
        """Return the gateway's own address."""
        return self._gateway_url

    def credential(self, session_token: str) -> str:
        """Return the session token, which the CLI presents itself."""
        return session_token

    def transport(self, options: ClaudeAgentOptions, folder: SessionFolder, files: Mapping[str, str]) -> Transport:
        """Write the files, and return a transport that starts the CLI like the SDK."""
        for name, text in files.items():
            path = folder.root / name
            path.write_text(text, encoding="utf-8")
            path.chmod(0o600)
        return CleanTransport(replace(options))

    async def background_processes(self, folder: SessionFolder, pid: int) -> BackgroundProcesses:
        """Search for processes with the session's marks. If the search fails, assume that some exist."""
        try:
            return BackgroundProcesses(*await asyncio.to_thread(background_of, folder.root, pid))
        except OSError:  # out of descriptors; ending a session must not fail because of that
            return BackgroundProcesses(True, True)

    async def end(self, folder: SessionFolder, pid: int | None, transport: Transport | None) -> bool:
        """Find and kill the processes with the session's marks."""
        return await asyncio.to_thread(kill_session, folder.root, pid)

    async def remove(self, folder: SessionFolder) -> None:
        """Kill the processes that still use the folder, and remove it."""
        await asyncio.to_thread(kill_session, folder.root, None)
        await folder.remove()


class PerSessionIsolation(Isolation):
    """Each session in its own sandbox, which the launcher creates and enters."""

    separate = True

    def __init__(self, launcher: LauncherClient, gateway_url: str, tasks: Tasks, user_share: float = 1.0) -> None:
        self._launcher = launcher
        self._gateway_url = gateway_url
        self._tasks = tasks
        self._user_share = user_share

    def folder(self, session_id: str, user_id: str | None = None) -> SessionFolder:
        """Return the paths inside the sandbox, which are the same for every session."""
        return SessionFolder(session_id, Path(FOLDER), user="" if user_id is None else _user_key(user_id))

    async def assign(self, folder: SessionFolder, user_id: str) -> None:
        """Move the session's processes into its user's control group, through the launcher."""
        user = _user_key(user_id)
        if folder.user != user:
            await self._launcher.assign(folder.session_id, Share(user, self._user_share))
            folder.user = user

    async def limit_reached(self, folder: SessionFolder) -> str | None:
        """Return the limit that the launcher reads from the control groups' counters."""
        reached = await self._launcher.limit_reached(folder.session_id)
        return None if reached is None else reached.message

    def _share(self, folder: SessionFolder) -> Share:
        return Share(folder.user, self._user_share) if folder.user else Share()

    async def prepare(self, folder: SessionFolder) -> None:
        """Only check the folder: the launcher creates it with the session's first process."""
        _refuse_released(folder)

    async def file_size(self, folder: SessionFolder, path: str) -> int | None:
        """Return the size from the launcher, which follows no link."""
        return await self._launcher.file_size(folder.session_id, path)

    async def usage(self, folder: SessionFolder) -> Usage | None:
        """Return the usage from the launcher."""
        return await self._launcher.usage(folder.session_id)

    async def run_as(self, folder: SessionFolder, argv: Sequence[str], **options: Unpack[RunOptions]) -> int:
        """Run the command in the session's namespaces, without any network."""
        _refuse_released(folder)
        return await self._launcher.run_as(folder.session_id, argv, share=self._share(folder), **options)

    async def pack(self, folder: SessionFolder, *, stdout: int, stderr: int, timeout: float) -> int:
        """Pack through the launcher, which can read the session's files whatever their mode."""
        _refuse_released(folder)
        return await self._launcher.pack(
            folder.session_id, stdout=stdout, stderr=stderr, timeout=timeout, share=self._share(folder)
        )

    async def work_on_files(self, folder: SessionFolder, work: Sequence[str], *, channel: int, timeout: float) -> int:
        """Fork it into the session's namespaces, through the launcher."""
        _refuse_released(folder)
        return await self._launcher.work_on_files(
            folder.session_id, work, channel=channel, timeout=timeout, share=self._share(folder)
        )

    def model_url(self) -> str:
        """Return the model proxy's address inside the session's network namespace."""
        return f"http://{MODEL_ADDRESS[0]}:{MODEL_ADDRESS[1]}"

    def credential(self, session_token: str) -> str:
        """Return a placeholder: the model proxy adds the credential outside the sandbox."""
        return _PLACEHOLDER

    def transport(self, options: ClaudeAgentOptions, folder: SessionFolder, files: Mapping[str, str]) -> Transport:
        """Return a transport whose process the launcher starts."""
        model_proxy = ModelProxy(self._gateway_url, self._tasks)
        return LauncherTransport(
            replace(options), self._launcher, folder.session_id, model_proxy, files, share=self._share(folder)
        )

    async def background_processes(self, folder: SessionFolder, pid: int) -> BackgroundProcesses:
        """Search the PID namespace: background processes are children of the CLI or of the namespace's init."""
        return BackgroundProcesses(*children_and_siblings(pid))

    async def end(self, folder: SessionFolder, pid: int | None, transport: Transport | None) -> bool:
        """Kill the PID namespace; the launcher reports its end."""
        if isinstance(transport, LauncherTransport):
            await transport.end()
        return True

    async def remove(self, folder: SessionFolder) -> None:
        """Remove the folder through the launcher."""
        await self._launcher.remove(folder.session_id)


def build_isolation(
    state: Path, gateway_url: str, launcher: LauncherClient | None, tasks: Tasks, user_share: float = 1.0
) -> Isolation:
    """Return the isolation that this process supports. `user_share` is the part of the agent that one user may use."""
    if launcher is not None:
        return PerSessionIsolation(launcher, gateway_url, tasks, user_share)
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    return SharedUserIsolation(Path(os.path.realpath(state)), gateway_url)


def _user_key(user_id: str) -> str:
    """Return a name for the user's control group that does not reveal the user id."""
    return hashlib.sha256(user_id.encode()).hexdigest()[:32]


def _refuse_released(folder: SessionFolder) -> None:
    if folder.released:
        raise Unplaced("the session is no longer on this agent; try again", retry_after=1)
