"""The server's client of the launcher: runs processes as sessions and removes sessions. Asyncio.

Closing the client's end of a reply socket kills a `LaunchedProcess` with its whole pid namespace. The process has ended
once the launcher reports it, or once the launcher itself has exited, which kills all processes.
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
    receive_reply,
    send_request,
)
from hypercore_agents.agent.launcher.storage import Usage
from hypercore_agents.api.errors import AtCapacity, Unavailable

DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
KILLED = 137


class Share(NamedTuple):
    """A session's user, under a name that does not identify them, and the part of the agent that all of this user's
    sessions may use together."""

    user: str = ""
    part: float = 1.0

    def as_request(self) -> dict[str, Any]:
        """Return the fields of a request."""
        return {"user": self.user, "share": self.part}


class LaunchFailed(Unavailable):
    """The launcher could not start a process, or has exited."""


class LimitReached(LaunchFailed):
    """A session, its user or the agent is at a limit; `details.limit` is "memory", "processes" or "disk"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message, details={"limit": kind})
        self.kind = kind


class DiskAtCapacity(AtCapacity):
    """The disk of the host or of the agent cannot hold another active session; the message has the numbers."""


class LaunchedProcess:
    """A process of a session, in its own namespaces. `pid` is its number on the host, used to read its memory use.

    `listener` is the listening socket of the model routes in its network namespace. `limit` is the limit that ended the
    process, if any; set once it has ended.
    """

    def __init__(self, reply_socket: socket.socket, pid: int | None, listener: socket.socket | None) -> None:
        self.pid = pid if pid is not None else 0
        self.listener = listener
        self.returncode: int | None = None
        self.limit: LimitReached | None = None
        self._reply_socket = reply_socket
        self._ended = asyncio.ensure_future(self._until_ended())

    async def wait(self) -> int:
        """Return the exit status, as a shell reports it, once its pid namespace is empty."""
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        """Kill the process and all processes that it started; `wait` returns once they are gone. Safe to repeat."""
        with contextlib.suppress(OSError):
            self._reply_socket.shutdown(socket.SHUT_WR)

    terminate = kill

    async def _until_ended(self) -> int:
        code = KILLED
        try:
            reply, descriptors = await _next_reply(self._reply_socket)
            _close(descriptors)
            if reply is not None:
                code = int(reply.get("exited", KILLED))
                self.limit = _limit_in(reply)
        except OSError:
            pass
        finally:
            self._reply_socket.close()
            self.returncode = code
        return code


class LauncherClient:
    """Sends requests to the launcher. Created in the composition root; `close` ends every process started through it.

    `session_disk` is a sentence that says how sessions' files are limited.
    """

    def __init__(self, channel: socket.socket, session_disk: str = "unknown") -> None:
        self.session_disk = session_disk
        self._channel = channel
        self._sending = asyncio.Lock()

    @classmethod
    def inherited(cls, environment: MutableMapping[str, str]) -> "LauncherClient | None":
        """Return the client of the launcher that started this process, None if no launcher did."""
        text = environment.pop(FD_VARIABLE, None)
        session_disk = environment.pop(DISK_VARIABLE, "unknown")
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
        """Start a process as a session. The caller closes its descriptors. `share` None: the session has no user yet.

        `cwd` is below the session's folder. `files`, by name, are first written there as the session's user. With
        `network`, the process gets the listening socket of the model routes in its network namespace; without it, it
        can connect to nothing.

        Raises LimitReached if the session or its user is at a limit, LaunchFailed or DiskAtCapacity.
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
        return await self._start(request, [stdin, stdout, stderr])

    async def _start(self, request: Mapping[str, Any], stdio: list[int]) -> LaunchedProcess:
        reply_socket = await self._send(request, stdio)
        try:
            reply, descriptors = await _next_reply(reply_socket)
        except BaseException:
            reply_socket.close()  # this kills the process if it has started
            raise
        if reply is None or "error" in reply:
            _close(descriptors)
            reply_socket.close()
            if reply is not None and (limit := _limit_in(reply)) is not None:
                raise limit
            raise _failure("start a process", reply)
        listener = socket.socket(fileno=descriptors.pop(0)) if descriptors else None
        _close(descriptors)
        return LaunchedProcess(reply_socket, reply.get("started"), listener)

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

        A descriptor that is None is /dev/null. Raises LaunchFailed, and TimeoutError after `timeout` seconds, once the
        command is killed.
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
        return await self._wait(process, timeout)

    async def pack(self, session: str, *, stdout: int, stderr: int, timeout: float, share: Share | None = None) -> int:
        """Write the session's files as a tar stream (`protocol.pack_command`); return the exit status.

        Raises LaunchFailed, and TimeoutError after `timeout` seconds, once the command is killed.
        """
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            request = {"do": "pack", "session": session, **(share or Share()).as_request()}
            process = await self._start(request, [null, stdout, stderr])
        finally:
            os.close(null)
        return await self._wait(process, timeout)

    async def work_on_files(
        self, session: str, work: Sequence[str], *, channel: int, timeout: float, share: Share | None = None
    ) -> int:
        """Run a `workspace_files` operation as the session, over a socket; return the exit status. Raises as `pack`."""
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            request = {"do": "files", "session": session, "work": [*work], **(share or Share()).as_request()}
            process = await self._start(request, [channel, channel, null])
        finally:
            os.close(null)
        return await self._wait(process, timeout)

    async def _wait(self, process: LaunchedProcess, timeout: float) -> int:
        try:
            async with asyncio.timeout(timeout):
                return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def assign(self, session: str, share: Share) -> None:
        """Count the session's processes against this user's share from now on. Raises LimitReached or LaunchFailed."""
        await self._call({"do": "assign", "session": session, **share.as_request()})

    async def limit_reached(self, session: str) -> LimitReached | None:
        """Return the limit that the session reached since the last call, None for none. Raises LaunchFailed."""
        return _limit_in(await self._call({"do": "limits", "session": session}))

    async def file_size(self, session: str, path: str) -> int | None:
        """Return the size of a regular file of the session, None if there is none. Follows no links."""
        reply = await self._call({"do": "look", "session": session, "path": [*PurePosixPath(path).parts]})
        return int(reply["size"]) if reply.get("exists") else None

    async def usage(self, session: str) -> Usage | None:
        """Return the session's disk usage, None where the kernel does not count it. Raises LaunchFailed."""
        reply = await self._call({"do": "usage", "session": session})
        if "bytes" not in reply:
            return None
        return Usage(reply["bytes"], reply["byte_limit"], reply["files"], reply["file_limit"], reply["shared_by"])

    async def remove(self, session: str) -> None:
        """End the session's processes and remove its folder. Raises LaunchFailed."""
        await self._call({"do": "remove", "session": session})

    def close(self) -> None:
        """Close the connection to the launcher."""
        self._channel.close()

    async def _call(self, request: Mapping[str, Any]) -> dict[str, Any]:
        reply_socket = await self._send(request, [])
        try:
            reply, descriptors = await _next_reply(reply_socket)
        finally:
            reply_socket.close()
        _close(descriptors)
        if reply is not None and "error" in reply and (limit := _limit_in(reply)) is not None:
            raise limit
        if reply is None or "error" in reply:
            raise _failure(request["do"], reply)
        return reply

    async def _send(self, request: Mapping[str, Any], descriptors: list[int]) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            with theirs, contextlib.ExitStack() as stack:
                # Copies for the thread: it may send them after this call is cancelled and the caller's are closed.
                copies = [os.dup(descriptor) for descriptor in (theirs.fileno(), *descriptors)]
                stack.callback(_close, copies)
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
            raise LaunchFailed(f"the launcher has exited: {error}") from None
        except BaseException:
            ours.close()
            raise
        return ours


def _failure(action: str, reply: Mapping[str, Any] | None) -> LaunchFailed | DiskAtCapacity:
    if reply is not None and reply.get("full") == "disk":
        return DiskAtCapacity(str(reply["error"]))
    return LaunchFailed(f"the launcher could not {action}: {reply['error'] if reply else 'it has exited'}")


def session_environment() -> dict[str, str]:
    """Return the environment variables of every process of a session: its home, its programs."""
    return {
        "PATH": DEFAULT_PATH,
        "LANG": "C.UTF-8",
        "HOME": f"{FOLDER}/home",
        "TMPDIR": f"{FOLDER}/tmp",  # noqa: S108 (in the session's folder)
    }


def _limit_in(reply: Mapping[str, Any]) -> LimitReached | None:
    return LimitReached(*reply["limit"]) if "limit" in reply else None


async def _next_reply(reply_socket: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    while True:
        try:
            return receive_reply(reply_socket)
        except BlockingIOError:
            await _readable(reply_socket)


async def _readable(source: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(source.fileno(), _set_result(ready))
    try:
        await ready
    finally:
        loop.remove_reader(source.fileno())


def _set_result(future: "asyncio.Future[None]") -> Callable[[], None]:
    return lambda: None if future.done() else future.set_result(None)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
