"""The SDK's transport to a CLI that the launcher starts. Start, streams and end differ from the SDK's transport.

Standard input, output and error are sockets, not pipes: a tool can open a pipe through `/proc/PID/fd/1`, but not a
socket.

It depends on private parts of the SDK, whose version is pinned: how `SubprocessCLITransport` builds its command and
stores its streams and its process.
"""

import asyncio
import codecs
import contextlib
import socket
from collections.abc import Mapping
from typing import Any

from claude_agent_sdk import ClaudeAgentOptions, CLIConnectionError
from claude_agent_sdk._internal._task_compat import spawn_detached
from claude_agent_sdk._version import __version__

from hypercore_agents.agent.isolation.clean_transport import CleanTransport
from hypercore_agents.agent.isolation.model_proxy import ModelProxy
from hypercore_agents.agent.launcher.client import LaunchedProcess, LauncherClient, LimitReached, Share
from hypercore_agents.api.errors import HypercoreError

_CHUNK = 64 * 1024


class _Output:
    """The process's output as text, with the interface that the SDK reads from."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __aiter__(self) -> "_Output":
        return self

    async def __anext__(self) -> str:
        while True:
            try:
                data = await self._reader.read(_CHUNK)
            except OSError:
                data = b""
            if not data:
                raise StopAsyncIteration
            if text := self._decoder.decode(data):
                return text

    async def aclose(self) -> None:
        self._writer.transport.abort()


class _Input:
    """The process's standard input."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    async def send(self, text: str) -> None:
        self._writer.write(text.encode())
        await self._writer.drain()

    async def aclose(self) -> None:
        self._writer.close()


class LauncherTransport(CleanTransport):
    """One CLI in its own namespaces. `model_proxy` serves the model requests of this process alone."""

    def __init__(
        self,
        options: ClaudeAgentOptions,
        launcher: LauncherClient,
        session_id: str,
        model_proxy: ModelProxy,
        files: Mapping[str, str],
        *,
        share: Share | None = None,
    ) -> None:
        super().__init__(options)
        self.model_proxy = model_proxy
        self._launcher = launcher
        self._session_id = session_id
        self._files = files
        self._share = share
        self._limit: LimitReached | None = None
        self._launched: LaunchedProcess | None = None
        self._streams: list[Any] = []

    async def connect(self) -> None:
        """Start the CLI. Raises CLIConnectionError."""
        if self._process is not None:
            return
        command = self._build_command()
        environment = {
            "CLAUDE_CODE_ENTRYPOINT": "sdk-py",
            "CLAUDE_CODE_SDK_READS_SESSION_STATE": "1",
            **self._options.env,
            "CLAUDE_AGENT_SDK_VERSION": __version__,
            "PWD": str(self._cwd),
        }
        pairs = [socket.socketpair() for _ in range(3)]
        try:
            self._launched = await self._launcher.start(
                self._session_id,
                command,
                stdin=pairs[0][1].fileno(),
                stdout=pairs[1][1].fileno(),
                stderr=pairs[2][1].fileno(),
                environment=environment,
                cwd=str(self._cwd),
                files=self._files,
                network=True,
                share=self._share,
            )
            for _, theirs in pairs:
                theirs.close()
            ends = [await asyncio.open_connection(sock=ours, limit=_CHUNK) for ours, _ in pairs]
            if self._launched.listener is not None:
                await self.model_proxy.serve(self._launched.listener)
        except (HypercoreError, OSError) as error:
            for ours, theirs in pairs:
                ours.close()
                theirs.close()
            await self.end()
            self._limit = error if isinstance(error, LimitReached) else self._limit
            raise CLIConnectionError(f"Failed to start Claude Code: {error}") from error
        process: Any = self._launched
        stdin, stdout, stderr = _Input(ends[0][1]), _Output(*ends[1]), _Output(*ends[2])
        self._streams = [stdin, stdout, stderr]
        self._process = process
        self._stdin_stream, self._stdout_stream = _untyped(stdin), _untyped(stdout)
        if self._options.stderr is not None:
            self._stderr_stream = _untyped(stderr)
            self._stderr_task = spawn_detached(self._handle_stderr())
        self._ready = True

    @property
    def limit(self) -> LimitReached | None:
        """The limit that prevented the CLI's start or ended it, None if no limit did."""
        return self._limit or (self._launched.limit if self._launched is not None else None)

    async def close(self) -> None:
        """End gracefully: the CLI reads the end of its input, writes its last output and exits."""
        await super().close()
        await self.end()

    async def end(self) -> None:
        """Kill the remaining processes of the PID namespace, and wait for their end."""
        self.model_proxy.close()
        if self._launched is not None:
            self._launched.kill()
            await self._launched.wait()
        for stream in self._streams:
            with contextlib.suppress(OSError, RuntimeError):
                await stream.aclose()
        self._streams = []


def _untyped(stream: Any) -> Any:
    """Return the stream as it is, for attributes that the SDK declares with types of anyio."""
    return stream
