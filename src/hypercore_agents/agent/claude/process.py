"""One Claude CLI process, driven through the Agent SDK's `ClaudeSDKClient`.

Every private corner of the SDK that we lean on is in this module, so that a new version of it is checked in one place
(its version is pinned): the process behind the transport (to kill it, to know that it died), the buffer of messages
(to discard what came between turns), and the control request that changes variables of a running CLI.

Whatever goes wrong with a process comes out as `ClaudeFailed`; a process that failed is killed and never used again,
and the session goes on in a new one that resumes from the transcript.

Where and how the process is started, and what it takes to kill all of it, is the business of `isolation`.
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
"""A CLI on a busy host takes seconds to answer; to start another one in its place takes longer."""
_END_SECONDS = 1.0
"""How long a CLI whose output has ended may take to be gone; then the launcher knows why."""
_INITIALIZE_SECONDS = 86_400.0
_STDERR_LINES = 20
_STDERR_WIDTH = 300


class ClaudeFailed(AgentUnreachable):
    """The session's CLI did not start, died, hung or broke its protocol."""


class ClaudeEnded(ClaudeFailed):
    """The session's CLI ended by itself while it started: what it was to resume may be spoilt."""


class ClaudeLimited(ClaudeFailed):
    """The session's CLI ended, or did not start, because a limit was reached: the session's, its user's, the agent's.

    `details.limit` is "memory", "processes" or "disk". Trying the same again at once reaches it again.
    """

    retryable = False


class ClaudeRefused(InvalidRequest):
    """The CLI refused an option of the session at its start, and would refuse it again."""


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
"""What the CLI calls an option in its refusals, and the session option that it comes from."""


def refusal_in(error: str, stderr: str) -> ClaudeRefused | None:
    """Return the refusal of an option in what a CLI said that ended at its start; None when it ended otherwise."""
    if "Argument list too long" in error:
        return ClaudeRefused(
            "the session's options are longer than a command line may be; shorten mcp_servers, allowed_tools, "
            "disallowed_tools or output_schema"
        )
    for line in stderr.splitlines():
        kind, _, said = line.partition(":")
        if kind.lower() != "error":
            continue
        for word, field in _FIELDS.items():
            if word in said:
                return ClaudeRefused(f"{field}: the Claude CLI refuses it: {said.strip()[:_STDERR_WIDTH]}", field=field)
    return None


class _PatientClient(ClaudeSDKClient):
    """Has no limit of its own for a start, which `ClaudeProcess.start` judges by its progress: the SDK's is 60 s."""

    @property
    def _query(self) -> Any:
        return self.__dict__.get("_patient_query")

    @_query.setter
    def _query(self, query: Any) -> None:
        if query is not None:
            query._initialize_timeout = _INITIALIZE_SECONDS
        self.__dict__["_patient_query"] = query


class ClaudeProcess:
    """A connected CLI. One turn at a time; `interrupt` and `kill` may come from other tasks."""

    def __init__(
        self, options: ClaudeAgentOptions, folder: SessionFolder, isolation: Isolation, files: Mapping[str, str]
    ) -> None:
        self._folder = folder
        self._isolation = isolation
        self._stderr: deque[str] = deque(maxlen=_STDERR_LINES)
        options = replace(options, stderr=self._note)
        self._transport = isolation.transport(options, folder, files)
        self._client = _PatientClient(options, self._transport)
        self._closed = False
        self._traced = False
        self._given_up: str | None = None
        self.prompted = False
        """Whether it was ever given a prompt."""
        self._changed: dict[str, str] = {}

    async def start(self, *, window: float) -> float:
        """Start and connect; return the share of a processor that the start got.

        It is given up after `window` seconds without progress (`progress`). Raises ClaudeFailed, ClaudeRefused or
        AtCapacity; then nothing of the process is left.
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
            given_up = self._given_up
            await self.kill()
            _log.warning("claude.start_failed", given_up=given_up, error=_said(error), stderr=self.stderr())
            if (limited := self._limited("the Claude CLI did not start")) is not None:
                raise limited from None
            if given_up is not None:
                raise ClaudeFailed(f"the Claude CLI did not start: {given_up}") from None
            if (refused := refusal_in(str(error), self.stderr())) is not None:
                raise refused from None
            raise ClaudeEnded("the Claude CLI ended at its start; the agent's log says why") from None
        finally:
            watching.cancel()
        if self.pid and (work := activity_of(self.pid)) is not None:
            progress.update(work)
        return progress.share

    async def _watch_start(self, progress: StartProgress) -> None:
        """Kill a start that makes no progress: its connect then fails at once (one that is cancelled waits 15 s)."""
        while self._given_up is None:
            await asyncio.sleep(min(1.0, progress.window / 4))
            pid = self.pid
            self._given_up = progress.update(activity_of(pid) if pid else None)
        self.kill_now()

    @property
    def pid(self) -> int | None:
        """Process id of the CLI, None before it started."""
        process = self._process()
        return None if process is None else int(process.pid)

    @property
    def alive(self) -> bool:
        """Whether the process still runs and is ours to use."""
        process = self._process()
        return not self._closed and process is not None and process.returncode is None

    def stderr(self) -> str:
        """Return the last lines that the CLI wrote to its standard error, without what looks like a secret."""
        return "\n".join(self._stderr)

    async def send(self, prompt: str) -> str:
        """Begin a turn; returns the prompt's id, by which the turn's result names it. Raises ClaudeFailed."""
        self._discard_buffered()
        self.prompted = True
        prompt_id = str(uuid.uuid4())

        async def one() -> AsyncIterator[dict[str, Any]]:
            yield {
                "type": "user",
                "message": {"role": "user", "content": prompt},
                "parent_tool_use_id": None,
                "uuid": prompt_id,
            }

        try:
            await self._client.query(one())
        except Exception as error:
            raise ClaudeFailed(f"the Claude CLI takes no prompt: {_said(error)}") from None
        return prompt_id

    async def messages(self) -> AsyncGenerator[Message, None]:
        """Yield what the CLI says, until the caller has heard enough. Raises ClaudeFailed when it ends or babbles."""
        received = cast(AsyncGenerator[Message, None], self._client.receive_messages())
        try:
            async for message in received:
                yield message
        except Exception as error:
            if not self._closed:
                _log.warning("claude.failed", error=_said(error), stderr=self.stderr())
                if (limited := await self._limit_of_the_dead()) is not None:
                    raise limited from None
            raise ClaudeFailed("the Claude CLI died in mid-turn; the session goes on with its next turn") from None
        finally:
            await received.aclose()
        if not self._closed and (limited := await self._limit_of_the_dead()) is not None:
            raise limited
        raise ClaudeFailed("the Claude CLI ended in mid-turn; the session goes on with its next turn")

    async def _limit_of_the_dead(self) -> ClaudeFailed | None:
        """Return the error that names the limit for which the CLI was killed in its turn, None when it was none."""
        process = self._process()
        if process is not None and isinstance(self._transport, LauncherTransport):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_SECONDS):
                    await process.wait()
        return self._limited("the Claude CLI was ended in mid-turn")

    def _limited(self, what: str) -> ClaudeFailed | None:
        limit = self._transport.limit if isinstance(self._transport, LauncherTransport) else None
        if limit is None:
            return None
        return ClaudeLimited(f"{what}: {limit.message}; the session goes on with its next turn", details=limit.details)

    async def interrupt(self) -> None:
        """Ask the CLI to end its turn; the result still comes. Raises ClaudeFailed when it does not listen."""
        await self._control({"subtype": "interrupt"})

    async def renew_credential(self, session_token: str) -> None:
        """Give a running CLI a fresh credential. Raises ClaudeFailed when it does not take it."""
        if isinstance(self._transport, LauncherTransport):
            self._transport.model_proxy.token = session_token
            return
        await self._change(token_environment(session_token))

    async def set_traceparent(self, traceparent: str | None) -> None:
        """Have the next model requests carry this `traceparent`; None: none any more. Raises ClaudeFailed.

        The pinned CLI reads TRACEPARENT only for telemetry of its own, which is off, and hands it to its tools; model
        requests get it as a custom header.
        """
        if traceparent is None and not self._traced:
            return
        self._traced = traceparent is not None
        custom = f"traceparent: {traceparent}" if traceparent is not None else ""
        await self._change({"ANTHROPIC_CUSTOM_HEADERS": custom, "TRACEPARENT": traceparent or ""})

    async def _change(self, variables: dict[str, str]) -> None:
        """Change variables of the running CLI; those changed before keep their values."""
        self._changed |= variables
        await self._control({"subtype": "apply_flag_settings", "settings": {"env": self._changed}})

    async def mcp_server_notices(self) -> list[str]:
        """Return a notice for each MCP server whose tools are not there. Raises ClaudeFailed."""
        query: Any = getattr(self._client, "_query", None)
        try:
            found = await query.get_mcp_status()
        except Exception as error:
            raise ClaudeFailed(f"the Claude CLI did not say how its MCP servers are: {_said(error)}") from None
        return mcp_notices(found.get("mcpServers"))

    async def set_model(self, model: str | None) -> None:
        """Let the CLI ask this model from now on. Raises ClaudeFailed when it does not take it."""
        await self._control({"subtype": "set_model", "model": model})

    def set_session_id(self, session_id: str) -> None:
        """Say whose requests the CLI's are, where they pass by the server; a spare's own id means nothing to others."""
        if isinstance(self._transport, LauncherTransport):
            self._transport.model_proxy.session_id = session_id

    async def park(self) -> None:
        """End the process in good order (its transcript is complete), then whatever it left behind."""
        self._closed = True
        await self._disconnect()
        await self._isolation.end(self._folder, None, self._transport)

    def kill_now(self) -> None:
        """Send SIGKILL to the CLI alone, without waiting; `kill` does the rest."""
        process = self._process()
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def kill(self) -> None:
        """Kill the process and everything it started; returns when they are gone."""
        self._closed = True
        if not await self._isolation.end(self._folder, self.pid, self._transport):
            _log.error("claude.not_killed", session_id=self._folder.session_id)
        await self._disconnect()

    async def _disconnect(self) -> None:
        process = self._process()
        with contextlib.suppress(Exception):
            await self._client.disconnect()
        # A pipe whose reading was paused (more output than anybody took) never sees its end and would stay open.
        transport = getattr(getattr(process, "_process", None), "_transport", None)
        if transport is not None:
            transport.close()

    def _process(self) -> Any:
        return getattr(getattr(self._client, "_transport", None), "_process", None)

    def _discard_buffered(self) -> None:
        """Drop what the CLI said between turns, so that it is not taken for an answer to the next prompt."""
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
            raise ClaudeFailed(f"the Claude CLI did not take {request['subtype']}: {_said(error)}") from None

    def _note(self, line: str) -> None:
        self._stderr.append(mask_secrets(line[:_STDERR_WIDTH]))


def mcp_notices(servers: Any) -> list[str]:
    """Return a notice for each server that is not connected, from the CLI's list of all."""
    notices = []
    for server in servers if isinstance(servers, list) else ():
        status = server.get("status") if isinstance(server, dict) else None
        if isinstance(status, str) and status != "connected":
            name = str(server.get("name"))[:64]
            why = f": {mask_secrets(str(server['error'])[:_STDERR_WIDTH])}" if server.get("error") else ""
            notices.append(f"the tools of MCP server {name} are missing: it did not start ({status[:32]}{why})")
    return notices


def _said(error: Exception) -> str:
    return mask_secrets(f"{type(error).__name__}: {str(error)[:_STDERR_WIDTH]}")
