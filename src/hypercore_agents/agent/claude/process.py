"""One Claude CLI process, driven through the Agent SDK's `ClaudeSDKClient`.

This module contains every use of the SDK's private parts, so that a new SDK version is checked in one place (the
version is pinned): the process behind the transport (to kill it and to detect its end), the message buffer (to discard
messages between turns), and the control request that changes variables of a running CLI.

Every failure of a process is raised as `ClaudeFailed`. A failed process is killed and never used again; the session
continues in a new one that resumes from the transcript.

`isolation` decides where and how the process starts, and how all of its processes are killed.
"""

import asyncio
import contextlib
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import replace
from typing import Any, cast

import anyio
import structlog
from claude_agent_sdk import ClaudeAgentOptions, ClaudeSDKClient, Message

from hypercore_agents.agent.claude.environment import token_environment
from hypercore_agents.agent.claude.start_progress import StartProgress, activity_of
from hypercore_agents.agent.isolation.backends import Isolation
from hypercore_agents.agent.isolation.transport import LauncherTransport
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.api.errors import AgentUnreachable, AtCapacity, InvalidRequest
from hypercore_agents.observability.logging import mask_secrets

_log = structlog.get_logger(__name__)
_CONTROL_SECONDS = 20.0
"""A CLI on a busy host takes seconds to answer; starting a replacement would take longer."""
_END_SECONDS = 1.0
"""Maximum wait for the exit of a CLI whose output has ended; the launcher reports the cause with the exit."""
_INITIALIZE_SECONDS = 86_400.0
_CONTINUES = "the session continues with its next turn"
_STDERR_LINES = 20
_STDERR_WIDTH = 300


class ClaudeFailed(AgentUnreachable):
    """The session's CLI did not start, died, hung or broke its protocol."""


class ClaudeEnded(ClaudeFailed):
    """The session's CLI exited during its start; the history that it should resume may be corrupt."""


class ClaudeLimited(ClaudeFailed):
    """The session's CLI exited, or did not start, because the session, its user or the agent reached a limit.

    `details.limit` is "memory", "processes" or "disk". An immediate retry reaches the limit again.
    """

    retryable = False


class ClaudeRefused(InvalidRequest):
    """The CLI rejected an option of the session at its start; every retry fails the same way."""


_FIELDS = {
    "--json-schema": "output_schema",
    "--mcp-config": "mcp_servers",
    "MCP config": "mcp_servers",
    "--allowed": "allowed_tools",
    "--disallowed": "disallowed_tools",
    "--fallback-model": "fallback_model",
    "--model": "model",
    "--effort": "effort",
    "--max-thinking-tokens": "thinking",
    "--thinking": "thinking",
    "--max-turns": "max_turns",
    "--permission-mode": "permission_mode",
    "--tools": "tools",
}
"""Name of an option in the CLI's error messages, and the session option behind it."""


def refusal_in(error: str, stderr: str) -> ClaudeRefused | None:
    """Return the error for an option that a CLI rejected at its start; None when it exited for another reason."""
    if "Argument list too long" in error:
        return ClaudeRefused(
            "the session's options exceed the maximum length of a command line; shorten mcp_servers, allowed_tools, "
            "disallowed_tools or output_schema"
        )
    for line in stderr.splitlines():
        kind, _, message = line.partition(":")
        if kind.lower() != "error":
            continue
        for word, field in _FIELDS.items():
            if word in message:
                cause = message.strip()[:_STDERR_WIDTH]
                return ClaudeRefused(f"{field}: rejected by the Claude CLI: {cause}", field=field)
    return None


class _ClientWithoutStartTimeout(ClaudeSDKClient):
    """Removes the SDK's limit of 60 s for a start, which `ClaudeProcess.start` judges by its progress."""

    @property
    def _query(self) -> Any:
        return self.__dict__.get("_query_without_timeout")

    @_query.setter
    def _query(self, query: Any) -> None:
        if query is not None:
            query._initialize_timeout = _INITIALIZE_SECONDS
        self.__dict__["_query_without_timeout"] = query


class ClaudeProcess:
    """A connected CLI. One turn at a time; `interrupt` and `kill` may come from other tasks."""

    def __init__(
        self, options: ClaudeAgentOptions, folder: SessionFolder, isolation: Isolation, files: Mapping[str, str]
    ) -> None:
        self._folder = folder
        self._isolation = isolation
        self._stderr: deque[str] = deque(maxlen=_STDERR_LINES)
        options = replace(options, stderr=self._store_stderr)
        self._transport = isolation.transport(options, folder, files)
        self._client = _ClientWithoutStartTimeout(options, self._transport)
        self._closed = False
        self._traced = False
        self._give_up_reason: str | None = None
        self.prompted = False
        """Whether it has received a prompt."""
        self._changed: dict[str, str] = {}

    async def start(self, *, window: float) -> float:
        """Start and connect; return the share of a processor that the start had.

        The start is given up after `window` seconds without progress (`start_progress`). Raises ClaudeFailed,
        ClaudeRefused or AtCapacity, after ending all processes of the start.
        """
        progress = StartProgress(window, asyncio.get_running_loop().time)
        watching = asyncio.create_task(self._watch_start(progress), name="claude.watch-start")
        try:
            await self._client.connect()
        except asyncio.CancelledError:
            await self.kill()
            raise
        except Exception as error:
            if isinstance(error.__cause__, AtCapacity):
                await self.kill()
                raise error.__cause__ from None
            given_up = self._give_up_reason
            await self.kill()
            _log.warning("claude.start_failed", given_up=given_up, error=_text_of(error), stderr=self.stderr())
            if (limited := self._limited("the Claude CLI did not start")) is not None:
                raise limited from None
            if given_up is not None:
                raise ClaudeFailed(f"the Claude CLI did not start: {given_up}") from None
            if (refused := refusal_in(str(error), self.stderr())) is not None:
                raise refused from None
            raise ClaudeEnded("the Claude CLI exited during its start; the agent's log has the cause") from None
        finally:
            watching.cancel()
        if self.pid and (activity := activity_of(self.pid)) is not None:
            progress.update(activity)
        return progress.share

    async def _watch_start(self, progress: StartProgress) -> None:
        """Kill a start that makes no progress. Its connect then fails at once; cancelling it would take 15 s."""
        while self._give_up_reason is None:
            await asyncio.sleep(min(1.0, progress.window / 4))
            pid = self.pid
            self._give_up_reason = progress.update(activity_of(pid) if pid else None)
        self.kill_now()

    @property
    def pid(self) -> int | None:
        """Process id of the CLI, None before its start."""
        process = self._process()
        return None if process is None else int(process.pid)

    @property
    def alive(self) -> bool:
        """Whether the process runs and may be used."""
        process = self._process()
        return not self._closed and process is not None and process.returncode is None

    def stderr(self) -> str:
        """Return the last lines of the CLI's standard error, with secrets masked."""
        return "\n".join(self._stderr)

    async def send(self, prompt: str) -> str:
        """Begin a turn; return the prompt's id, which the turn's result repeats. Raises ClaudeFailed."""
        self._discard_buffered()
        self.prompted = True
        prompt_id = str(uuid.uuid4())

        async def messages() -> AsyncIterator[dict[str, Any]]:
            yield {
                "type": "user",
                "message": {"role": "user", "content": prompt},
                "parent_tool_use_id": None,
                "uuid": prompt_id,
            }

        try:
            await self._client.query(messages())
        except Exception as error:
            raise ClaudeFailed(f"the Claude CLI did not accept the prompt: {_text_of(error)}") from None
        return prompt_id

    async def messages(self) -> AsyncGenerator[Message, None]:
        """Yield the CLI's messages until the caller stops. Raises ClaudeFailed on its exit or on invalid output."""
        received = cast(AsyncGenerator[Message, None], self._client.receive_messages())
        try:
            async for message in received:
                yield message
        except Exception as error:
            if not self._closed:
                _log.warning("claude.failed", error=_text_of(error), stderr=self.stderr())
                if (limited := await self._exit_limit()) is not None:
                    raise limited from None
            raise ClaudeFailed(f"the Claude CLI failed during the turn; {_CONTINUES}") from None
        finally:
            await received.aclose()
        if not self._closed and (limited := await self._exit_limit()) is not None:
            raise limited
        raise ClaudeFailed(f"the Claude CLI exited during the turn; {_CONTINUES}")

    async def _exit_limit(self) -> ClaudeFailed | None:
        """Return the error for the limit that ended the CLI during its turn, None when no limit did."""
        process = self._process()
        if process is not None and isinstance(self._transport, LauncherTransport):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_SECONDS):
                    await process.wait()
        return self._limited("the Claude CLI was ended during the turn")

    def _limited(self, what: str) -> ClaudeFailed | None:
        limit = self._transport.limit if isinstance(self._transport, LauncherTransport) else None
        if limit is None:
            return None
        return ClaudeLimited(f"{what}: {limit.message}; {_CONTINUES}", details=limit.details)

    async def interrupt(self) -> None:
        """Request the end of the turn; its result still follows. Raises ClaudeFailed without a reply."""
        await self._control({"subtype": "interrupt"})

    async def renew_credential(self, session_token: str) -> None:
        """Replace the credential of a running CLI. Raises ClaudeFailed."""
        if isinstance(self._transport, LauncherTransport):
            self._transport.model_proxy.token = session_token
            return
        await self._change(token_environment(session_token))

    async def set_traceparent(self, traceparent: str | None) -> None:
        """Add this `traceparent` to later model requests, or none with None. Raises ClaudeFailed.

        The pinned CLI reads TRACEPARENT only for its own telemetry, which is off, and passes it to its tools. Model
        requests get it as a custom header.
        """
        if traceparent is None and not self._traced:
            return
        self._traced = traceparent is not None
        custom = f"traceparent: {traceparent}" if traceparent is not None else ""
        await self._change({"ANTHROPIC_CUSTOM_HEADERS": custom, "TRACEPARENT": traceparent or ""})

    async def _change(self, variables: dict[str, str]) -> None:
        """Change variables of the running CLI; earlier changes stay in effect."""
        self._changed |= variables
        await self._control({"subtype": "apply_flag_settings", "settings": {"env": self._changed}})

    async def mcp_server_notices(self) -> list[str]:
        """Return a notice for each MCP server whose tools are missing. Raises ClaudeFailed."""
        query: Any = getattr(self._client, "_query", None)
        try:
            status = await query.get_mcp_status()
        except Exception as error:
            raise ClaudeFailed(f"the Claude CLI did not report its MCP servers: {_text_of(error)}") from None
        return mcp_notices(status.get("mcpServers"))

    async def set_model(self, model: str | None) -> None:
        """Use this model from now on. Raises ClaudeFailed."""
        await self._control({"subtype": "set_model", "model": model})

    def set_session_id(self, session_id: str) -> None:
        """Label the CLI's model requests with this session, where the server proxies them.

        Outside the agent, a prewarmed CLI's own session id has no meaning.
        """
        if isinstance(self._transport, LauncherTransport):
            self._transport.model_proxy.session_id = session_id

    async def park(self) -> None:
        """End the process gracefully, with a complete transcript, and then its remaining processes."""
        self._closed = True
        await self._disconnect()
        await self._isolation.end(self._folder, None, self._transport)

    def kill_now(self) -> None:
        """Send SIGKILL to the CLI alone, without waiting. Call `kill` afterwards."""
        process = self._process()
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def kill(self) -> None:
        """Kill the process and everything it started; return after their end."""
        self._closed = True
        if not await self._isolation.end(self._folder, self.pid, self._transport):
            _log.error("claude.not_killed", session_id=self._folder.session_id)
        await self._disconnect()

    async def _disconnect(self) -> None:
        process = self._process()
        with contextlib.suppress(Exception):
            await self._client.disconnect()
        # A pipe whose reading is paused, because its output was not consumed, never reports its end and stays open.
        transport = getattr(getattr(process, "_process", None), "_transport", None)
        if transport is not None:
            transport.close()

    def _process(self) -> Any:
        return getattr(getattr(self._client, "_transport", None), "_process", None)

    def _discard_buffered(self) -> None:
        """Drop messages that arrived between turns, so that they do not count as an answer to the next prompt."""
        stream = getattr(getattr(self._client, "_query", None), "_message_receive", None)
        if stream is None:
            raise ClaudeFailed("the Claude CLI is not connected")
        with contextlib.suppress(anyio.WouldBlock, anyio.EndOfStream, anyio.ClosedResourceError):
            while True:
                message = stream.receive_nowait()
                if message.get("type") in ("end", "error"):
                    raise ClaudeFailed("the Claude CLI ended between turns")

    async def _control(self, request: dict[str, Any]) -> None:
        query: Any = getattr(self._client, "_query", None)
        if query is None:
            raise ClaudeFailed("the Claude CLI is not connected")
        try:
            await query._send_control_request(request, timeout=_CONTROL_SECONDS)
        except Exception as error:
            raise ClaudeFailed(f"the Claude CLI did not accept {request['subtype']}: {_text_of(error)}") from None

    def _store_stderr(self, line: str) -> None:
        self._stderr.append(mask_secrets(line[:_STDERR_WIDTH]))


def mcp_notices(servers: Any) -> list[str]:
    """Return a notice for each server in the CLI's list that is not connected."""
    notices = []
    for server in servers if isinstance(servers, list) else ():
        status = server.get("status") if isinstance(server, dict) else None
        if isinstance(status, str) and status != "connected":
            name = str(server.get("name"))[:64]
            why = f": {mask_secrets(str(server['error'])[:_STDERR_WIDTH])}" if server.get("error") else ""
            notices.append(f"the tools of MCP server {name} are missing: it did not start ({status[:32]}{why})")
    return notices


def _text_of(error: Exception) -> str:
    return mask_secrets(f"{type(error).__name__}: {str(error)[:_STDERR_WIDTH]}")
