"""The asynchronous client. It imports aiohttp with the first call."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

from pydantic import BaseModel

from hypercore_agents.api.agents import AgentDeleted, AgentList, AgentView, StatsView
from hypercore_agents.api.approvals import ApprovalResolved
from hypercore_agents.api.chat import ChatResponse, InterruptResponse, SessionDeleted, SessionList
from hypercore_agents.api.events import SessionEvents
from hypercore_agents.api.files import FileDeleted, FileList, FileWritten
from hypercore_agents.api.history import HISTORY_PAGE, SessionDetail
from hypercore_agents.api.usage import UsageReport
from hypercore_agents.client import calls
from hypercore_agents.client.calls import Call, ChatOptions, SpawnOptions
from hypercore_agents.client.errors import ClientError, ServerError, Unreachable, error_of
from hypercore_agents.client.log_tail import WINDOW, LogTail, has_ended
from hypercore_agents.client.retry_policy import Retries, Retrying
from hypercore_agents.client.settings import endpoint
from hypercore_agents.client.streams import SILENCE_SECONDS, Event, TextPieces, TurnStream

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T", bound=BaseModel)
_CONNECT_SECONDS = 10.0


class AsyncClient:
    """Asynchronous client of the platform; use it with `async with`.

    `url` and `token` default to HYPERCORE_AGENTS_URL and HYPERCORE_AGENTS_TOKEN. `connections` limits the open
    connections; 0 means no limit.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        retrying: Retrying | None = None,
        tls: ssl.SSLContext | None = None,
        connections: int = 0,
    ) -> None:
        self._endpoint = endpoint(url, token)
        self._retrying = retrying or Retrying()
        self._tls = tls
        self._connections = connections
        self._http: aiohttp.ClientSession | None = None
        self._single_use: aiohttp.ClientSession | None = None
        self._open_turns: set[TurnStream] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections. Open streams are closed as by their own `close()`."""
        for turn in tuple(self._open_turns):
            await self._interrupt_unfinished(turn)
        sessions, self._http, self._single_use = (self._http, self._single_use), None, None
        for session in sessions:
            if session is not None:
                await session.close()

    @property
    def url(self) -> str:
        """The base URL of the platform."""
        return self._endpoint.url

    async def chat(
        self,
        prompt: str,
        *,
        user_id: str,
        session_id: str | None = None,
        agent_id: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatResponse:
        """Run one turn and return its result. Without `session_id`, the turn starts a new session."""
        return await self._run(calls.chat(prompt, user_id, session_id, agent_id, options, stream=False))

    def stream(
        self,
        prompt: str,
        *,
        user_id: str,
        session_id: str | None = None,
        agent_id: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> "AsyncStream":
        """Run one turn and yield its events as they arrive. The turn starts with the first iteration."""
        return AsyncStream(self, TurnStream(prompt, user_id, session_id, agent_id, options, self._retrying))

    async def spawn(self, user_id: str, *, wait: bool = True, **options: Unpack[SpawnOptions]) -> AgentView:
        """Start a dedicated agent of this user; with `wait`, return when it is ready."""
        return await self._run(calls.spawn(user_id, options, wait))

    async def agents(self, user_id: str | None = None) -> AgentList:
        """List live agents of one user, or of all users."""
        return await self._run(calls.agents(user_id))

    async def agent(self, agent_id: str) -> AgentView:
        """Show one agent."""
        return await self._run(calls.agent(agent_id))

    async def delete_agent(self, agent_id: str) -> AgentDeleted:
        """Stop one agent and end its sessions."""
        return await self._run(calls.delete_agent(agent_id))

    async def stats(self) -> StatsView:
        """Count agents, sessions and capacity."""
        return await self._run(calls.stats())

    async def usage(
        self, user_id: str | None = None, *, since: str | None = None, until: str | None = None
    ) -> UsageReport:
        """Sum tokens and cost; `since` and `until` are days as YYYY-MM-DD, inclusive."""
        return await self._run(calls.usage(user_id, since, until))

    async def sessions(
        self, user_id: str | None = None, *, after: str | None = None, limit: int | None = None
    ) -> SessionList:
        """List a page of the sessions that have not ended; `after` is `next` of the previous page."""
        return await self._run(calls.sessions(user_id, after, limit))

    async def session(
        self, session_id: str, *, history: int = HISTORY_PAGE, before: int | None = None
    ) -> SessionDetail:
        """Show one session and its newest `history` messages; `before` is `history_next` of the previous answer."""
        return await self._run(calls.session(session_id, history, before))

    async def events(self, session_id: str, *, after: str | None = None, limit: int = 100) -> SessionEvents:
        """List a page of a session's event log: the events after an event id, or from the start."""
        return await self._run(calls.session_events(session_id, after, limit))

    async def delete_session(self, session_id: str) -> SessionDeleted:
        """End one session permanently."""
        return await self._run(calls.delete_session(session_id))

    async def interrupt(self, session_id: str) -> InterruptResponse:
        """Interrupt the running turn of a session."""
        return await self._run(calls.interrupt(session_id))

    async def logs(self, agent_id: str, *, limit: int = 65536) -> str:
        """Return the end of an agent's log, at most `limit` bytes (1 to 1,048,576)."""
        return (await self._read_with_retries(calls.logs(agent_id, limit)))[1].decode(errors="replace")

    async def follow_logs(self, agent_id: str, *, tail: int = 100, every: float = 0.5) -> AsyncIterator[str]:
        """Yield the last `tail` lines of an agent's log, then each new line, until the agent ends.

        Polls every `every` seconds and yields complete lines without their line ends. The log is removed with its
        agent: lines after the last poll before its end are not yielded.
        """
        log = LogTail(tail)
        while True:
            lines = log.feed((await self._read_with_retries(calls.logs(agent_id, WINDOW)))[1])
            for line in lines:
                yield line
            if not lines and has_ended(await self.agent(agent_id)):
                for line in log.rest():
                    yield line
                return
            await asyncio.sleep(every)

    async def get(self, path: str) -> tuple[Mapping[str, str], bytes]:
        """Get any other path; return the headers and the body of the answer."""
        return await self._read_with_retries(calls.page(path))

    async def files(self, session_id: str, *, after: str | None = None, limit: int | None = None) -> FileList:
        """List a page of the files of a session's workspace; `after` is `next` of the previous page."""
        return await self._run(calls.files(session_id, after, limit))

    async def read_file(self, session_id: str, path: str) -> bytes:
        """Return a file of a session's workspace; `path` is relative to it."""
        return (await self._read_with_retries(calls.read_file(session_id, path)))[1]

    async def delete_file(self, session_id: str, path: str) -> FileDeleted:
        """Delete a file, a link or an empty folder of a session's workspace."""
        return await self._run(calls.delete_file(session_id, path))

    async def write_file(self, session_id: str, path: str, content: bytes) -> FileWritten:
        """Write a file into a session's workspace, replacing an existing one."""
        return await self._run(calls.write_file(session_id, path, content))

    async def resolve_approval(
        self, session_id: str, approval_id: str, *, allow: bool, message: str | None = None
    ) -> ApprovalResolved:
        """Allow or deny a tool call that waits for a decision; the model receives `message` with a denial."""
        return await self._run(calls.resolve_approval(session_id, approval_id, allow, message))

    async def _run(self, call: Call[T]) -> T:
        return calls.answered(call, self.url, (await self._read_with_retries(call))[1])

    async def _read_with_retries(self, call: Call[Any]) -> tuple[Mapping[str, str], bytes]:
        retries = Retries(self._retrying)
        while True:
            try:
                answer = await self._send(call, {}, call.seconds)
                try:
                    return answer.headers, await _read(answer)
                finally:
                    answer.release()
            except (ServerError, Unreachable) as error:
                pause = retries.pause(error, repeatable=call.repeatable, seconds=call.seconds)
                if pause is None:
                    raise
            await asyncio.sleep(pause)

    async def _send(self, call: Call[Any], extra: Mapping[str, str], silence: float) -> "aiohttp.ClientResponse":
        """Send one request and return the answer with its body unread. Raises ServerError and Unreachable."""
        import aiohttp

        # A failure on a stale keep-alive connection does not show whether the request arrived.
        single_use = not call.repeatable and self._retrying.attempts > 1
        try:
            answer = await self._session(single_use=single_use).request(
                call.method,
                self.url + call.path,
                data=call.body,
                headers=calls.headers(call, self._endpoint.token, extra),
                timeout=aiohttp.ClientTimeout(total=None, connect=_CONNECT_SECONDS, sock_read=silence),
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as error:
            sent = not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
            raise Unreachable(f"{self.url} did not answer: {_text(error)}", sent=sent) from error
        if answer.status >= 400:
            async with answer:
                raise error_of(answer.status, answer.headers, await _read(answer))
        return answer

    def _session(self, *, single_use: bool) -> "aiohttp.ClientSession":
        """Return the session with keep-alive connections, or the one that opens a connection per request."""
        import aiohttp

        session = self._single_use if single_use else self._http
        if session is None:
            tls = self._tls if self._tls is not None else True
            connector = aiohttp.TCPConnector(limit=self._connections, ssl=tls, force_close=single_use)
            session = aiohttp.ClientSession(connector=connector)
            if single_use:
                self._single_use = session
            else:
                self._http = session
        return session

    async def _interrupt_unfinished(self, turn: TurnStream) -> None:
        """Interrupt a turn whose stream is closed early."""
        open_sessions = self._http is not None or self._single_use is not None
        interruption = turn.interrupt_call() if open_sessions else None
        if interruption is not None:
            with contextlib.suppress(ClientError, TimeoutError):
                async with asyncio.timeout(interruption.seconds):
                    (await self._send(interruption, {}, interruption.seconds)).close()


class AsyncStream:
    """The events of one turn. Iterate over it or over `text()`, then call `result()`; `close()` ends it early.

    Use `async with` to leave a stream early, or close the client; leaving it interrupts the turn. After a plain `break`
    the turn is interrupted only when the stream is garbage-collected.
    """

    def __init__(self, client: AsyncClient, turn: TurnStream) -> None:
        self._client = client
        self._turn = turn
        self._events = _follow(client, turn)  # holds no reference to this object, so that both can be collected

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.close()

    @property
    def session_id(self) -> str | None:
        """The session's id, known after the first event."""
        return self._turn.reader.session_id

    async def result(self) -> ChatResponse:
        """Read the rest of the stream and return the result of the turn."""
        async for _ in self._events:
            pass
        return self._turn.result()

    async def text(self) -> AsyncIterator[str]:
        """Yield the text of the answer in pieces, each exactly once.

        Raises StreamLost if the answer restarted with a different text (a `reset`), or if the log of a lost stream does
        not hold all of it; `result()` still works.
        """
        pieces = TextPieces(self._turn.reader)
        async for event in self._events:
            if piece := pieces.of(event):
                yield piece

    async def close(self) -> None:
        """Close the connection, and interrupt an unfinished turn unless `on_disconnect` was set."""
        await self._events.aclose()
        await self._client._interrupt_unfinished(self._turn)


async def _follow(client: AsyncClient, turn: TurnStream) -> AsyncGenerator[Event, None]:
    import aiohttp

    answer: aiohttp.ClientResponse | None = None
    client._open_turns.add(turn)
    try:
        while not turn.reader.ended:
            try:
                if answer is None:
                    answer = await client._send(*turn.next(), SILENCE_SECONDS)
                while not turn.reader.ended:
                    for event in turn.feed(await answer.content.readany()):
                        yield event
            except (OSError, aiohttp.ClientError, ClientError) as error:
                if answer is not None:
                    answer.close()
                    answer = None
                await asyncio.sleep(turn.pause(error))
    except (GeneratorExit, asyncio.CancelledError):
        if answer is not None:
            answer.close()
        await client._interrupt_unfinished(turn)
        raise
    finally:
        client._open_turns.discard(turn)
        if answer is not None:
            answer.close()


async def _read(answer: "aiohttp.ClientResponse") -> bytes:
    import aiohttp

    try:
        return await answer.read()
    except (aiohttp.ClientError, OSError) as error:
        raise Unreachable(f"the answer was cut off: {_text(error)}", sent=True) from error


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
