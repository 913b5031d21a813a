"""The server's side of the launcher: run something as a session, look, remove. Asyncio; descriptors are closed here.

A `LaunchedProcess` is killed, with its whole pid namespace, by closing our half of its answering socket, and is known
to be gone when the launcher says so or is itself gone (which kills everything too).
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from hypercore_agents.agent.launcher.protocol import (
    DISK_VARIABLE,
    FD_VARIABLE,
    FOLDER,
    receive_answer,
    send_request,
)
from hypercore_agents.agent.launcher.storage import Usage
from hypercore_agents.api.errors import AtCapacity, Unavailable

DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
KILLED = 137


class Share(NamedTuple):
    """Whose a session is, by a name that says nothing of the user, and the part of the agent they may use with all of
    their sessions."""

    user: str = ""
    part: float = 1.0

    def as_request(self) -> dict[str, Any]:
        """Return the fields of a request."""
        return {"user": self.user, "share": self.part}


class LaunchFailed(Unavailable):
    """The launcher could not start a process, or is gone."""


class LimitReached(LaunchFailed):
    """A session, its user or the agent is at a limit; `details.limit` is "memory", "processes" or "disk"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message, details={"limit": kind})
        self.kind = kind


class NoDiskLeft(AtCapacity):
    """The disk of the host or of the agent has no room for another active session; the message has the numbers."""


class LaunchedProcess:
    """A process of a session in namespaces of its own. `pid` is the host's number of it, for looking at its memory.

    `limit` says, once it has ended, which limit it reached, if any.
    """

    def __init__(self, answer: socket.socket, pid: int | None, listener: socket.socket | None) -> None:
        self.pid = pid if pid is not None else 0
        self.listener = listener
        self.returncode: int | None = None
        self.limit: LimitReached | None = None
        self._answer = answer
        self._ended = asyncio.ensure_future(self._until_ended())

    async def wait(self) -> int:
        """Return the exit status, as a shell would put it, once nothing of its pid namespace is left."""
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        """Kill it and everything that it started; `wait` says when they are gone. Safe to repeat."""
        with contextlib.suppress(OSError):
            self._answer.shutdown(socket.SHUT_WR)

    terminate = kill

    async def _until_ended(self) -> int:
        code = KILLED
        try:
            said, descriptors = await _next_answer(self._answer)
            _close(descriptors)
            if said is not None:
                code = int(said.get("exited", KILLED))
                self.limit = _limit_in(said)
        except OSError:
            pass
        finally:
            self._answer.close()
            self.returncode = code
        return code


class LauncherClient:
    """Asks the launcher. Made in the composition root; `close` ends every process that was started through it."""

    def __init__(self, channel: socket.socket, session_disk: str = "not known") -> None:
        self.session_disk = session_disk
        """How sessions' files are limited, in one sentence for people."""
        self._channel = channel
        self._sending = asyncio.Lock()

    @classmethod
    def inherited(cls, environment: MutableMapping[str, str]) -> "LauncherClient | None":
        """Return the client of the launcher that started this process, None when none did."""
        text = environment.pop(FD_VARIABLE, None)
        session_disk = environment.pop(DISK_VARIABLE, "not known")
        if text is None:
            return None
        channel = socket.socket(fileno=int(text))
        channel.set_inheritable(False)
        return cls(channel, session_disk)

    async def start(
        self,
        session: str,
        argv: Sequence[str],
        *,
        stdin: int,
        stdout: int,
        stderr: int,
        environment: Mapping[str, str] | None = None,
        cwd: str = "workspace",
        files: Mapping[str, str] | None = None,
        network: bool = False,
        share: Share | None = None,
    ) -> LaunchedProcess:
        """Start a process as a session. Descriptors stay the caller's to close. Raises LaunchFailed or NoDiskLeft.

        LimitReached where its user or the session is at a limit. `share` None: the session has no user yet.

        `cwd` is below the session's folder. `files`, by name, are written there first, as the session's user. With
        `network` the process comes with the listening socket of the model routes in its network namespace; without it
        there is nothing to reach.
        """
        request = {
            "do": "run",
            "session": session,
            "argv": [*argv],
            "environment": dict(environment if environment is not None else session_environment()),
            "cwd": cwd,
            "files": dict(files or {}),
            "network": network,
            **(share or Share()).as_request(),
        }
        return await self._started(request, [stdin, stdout, stderr])

    async def _started(self, request: Mapping[str, Any], stdio: list[int]) -> LaunchedProcess:
        answer = await self._send(request, stdio)
        try:
            said, descriptors = await _next_answer(answer)
        except BaseException:
            answer.close()  # which kills what may have started
            raise
        if said is None or "error" in said:
            _close(descriptors)
            answer.close()
            if said is not None and (limit := _limit_in(said)) is not None:
                raise limit
            raise _failure("start a process", said)
        listener = socket.socket(fileno=descriptors.pop(0)) if descriptors else None
        _close(descriptors)
        return LaunchedProcess(answer, said.get("started"), listener)

    async def run_as(
        self,
        session: str,
        argv: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        timeout: float = 60.0,
        cwd: str = "workspace",
        environment: Mapping[str, str] | None = None,
        share: Share | None = None,
    ) -> int:
        """Run a command as the session, with its view of the files and no network; return its exit status.

        None: /dev/null. Raises LaunchFailed, and TimeoutError after `timeout` seconds; then it is gone.
        """
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            process = await self.start(
                session,
                argv,
                stdin=null if stdin is None else stdin,
                stdout=null if stdout is None else stdout,
                stderr=null if stderr is None else stderr,
                cwd=cwd,
                environment=environment,
                share=share,
            )
        finally:
            os.close(null)
        return await self._ended(process, timeout)

    async def pack(self, session: str, *, stdout: int, stderr: int, timeout: float, share: Share | None = None) -> int:
        """Write the session's files as a tar stream (`protocol.pack_command`); return the exit status.

        Raises LaunchFailed, and TimeoutError after `timeout` seconds; then it is gone.
        """
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            request = {"do": "pack", "session": session, **(share or Share()).as_request()}
            process = await self._started(request, [null, stdout, stderr])
        finally:
            os.close(null)
        return await self._ended(process, timeout)

    async def work_on_files(
        self, session: str, work: Sequence[str], *, channel: int, timeout: float, share: Share | None = None
    ) -> int:
        """Do `workspace_files` work as the session, spoken about on a socket; return the exit status.

        Raises as `pack`.
        """
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            request = {"do": "files", "session": session, "work": [*work], **(share or Share()).as_request()}
            process = await self._started(request, [channel, channel, null])
        finally:
            os.close(null)
        return await self._ended(process, timeout)

    async def _ended(self, process: LaunchedProcess, timeout: float) -> int:
        try:
            async with asyncio.timeout(timeout):
                return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def assign(self, session: str, share: Share) -> None:
        """Count what the session runs against this user's share from now on. Raises LimitReached or LaunchFailed."""
        await self._ask({"do": "assign", "session": session, **share.as_request()})

    async def limit_reached(self, session: str) -> LimitReached | None:
        """Return the limit that the session reached since this was last asked, None when none. Raises LaunchFailed."""
        return _limit_in(await self._ask({"do": "limits", "session": session}))

    async def look(self, session: str, path: str) -> int | None:
        """Return the size of a regular file of the session, None when there is none (no link is followed)."""
        said = await self._ask({"do": "look", "session": session, "path": [*PurePosixPath(path).parts]})
        return int(said["size"]) if said.get("exists") else None

    async def usage(self, session: str) -> Usage | None:
        """Return what the session has of its disk, None where the kernel does not count it. Raises LaunchFailed."""
        said = await self._ask({"do": "usage", "session": session})
        if "bytes" not in said:
            return None
        return Usage(said["bytes"], said["byte_limit"], said["files"], said["file_limit"], said["shared_by"])

    async def remove(self, session: str) -> None:
        """End everything of the session and remove its folder; its user is never used again. Raises LaunchFailed."""
        await self._ask({"do": "remove", "session": session})

    def close(self) -> None:
        """Let go of the launcher."""
        self._channel.close()

    async def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        answer = await self._send(request, [])
        try:
            said, descriptors = await _next_answer(answer)
        finally:
            answer.close()
        _close(descriptors)
        if said is not None and "error" in said and (limit := _limit_in(said)) is not None:
            raise limit
        if said is None or "error" in said:
            raise _failure(request["do"], said)
        return said

    async def _send(self, request: Mapping[str, Any], descriptors: list[int]) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            with theirs, contextlib.ExitStack() as held:
                # Copies for the thread: it may send them after this call was cancelled and the caller's are closed.
                copies = [os.dup(descriptor) for descriptor in (theirs.fileno(), *descriptors)]
                held.callback(_close, copies)
                async with self._sending:
                    sending = asyncio.ensure_future(
                        asyncio.to_thread(send_request, self._channel, dict(request), copies)
                    )
                    try:
                        await asyncio.shield(sending)
                    except asyncio.CancelledError:
                        await asyncio.wait((sending,))
                        raise
        except OSError as error:
            ours.close()
            raise LaunchFailed(f"the launcher is gone: {error}") from None
        except BaseException:
            ours.close()
            raise
        return ours


def _failure(what: str, said: Mapping[str, Any] | None) -> LaunchFailed | NoDiskLeft:
    if said is not None and said.get("full") == "disk":
        return NoDiskLeft(str(said["error"]))
    return LaunchFailed(f"the launcher could not {what}: {said['error'] if said else 'it is gone'}")


def session_environment() -> dict[str, str]:
    """Return the variables that every process of a session has: where its home is, and what finds programs."""
    return {
        "PATH": DEFAULT_PATH,
        "LANG": "C.UTF-8",
        "HOME": f"{FOLDER}/home",
        "TMPDIR": f"{FOLDER}/tmp",  # noqa: S108 (a folder of the session's own)
    }


def _limit_in(said: Mapping[str, Any]) -> LimitReached | None:
    return LimitReached(*said["limit"]) if "limit" in said else None


async def _next_answer(answer: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    while True:
        try:
            return receive_answer(answer)
        except BlockingIOError:
            await _readable(answer)


async def _readable(source: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(source.fileno(), _settle(ready))
    try:
        await ready
    finally:
        loop.remove_reader(source.fileno())


def _settle(future: "asyncio.Future[None]") -> Callable[[], None]:
    return lambda: None if future.done() else future.set_result(None)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
