"""The asynchronous face, on aiohttp, which is imported when the first call is made."""

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
from hypercore_agents.client.log_tail import WINDOW, Tail, is_over
from hypercore_agents.client.retry_policy import Retrying, Tries
from hypercore_agents.client.settings import door
from hypercore_agents.client.streams import SILENCE_SECONDS, Event, Following, Pieces

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T", bound=BaseModel)
_CONNECT_SECONDS = 10.0


class AsyncClient:
    """The platform, as one caller sees it; use it with `async with`. `connections`: at most so many at a time."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        retrying: Retrying | None = None,
        tls: ssl.SSLContext | None = None,
        connections: int = 0,
    ) -> None:
        self._door = door(url, token)
        self._retrying = retrying or Retrying()
        self._tls = tls
        self._connections = connections
        self._http: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None
        self._following: set[Following] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; streams that were left open are closed as by their own `close()`."""
        for turn in tuple(self._following):
            await self._leave(turn)
        sessions, self._http, self._fresh = (self._http, self._fresh), None, None
        for session in sessions:
            if session is not None:
                await session.close()

    @property
    def url(self) -> str:
        """The base URL that is called."""
        return self._door.url

    async def chat(
        self,
        prompt: str,
        *,
        user_id: str,
        session_id: str | None = None,
        agent_id: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatResponse:
        """Run one turn and return its result; without `session_id`, of a new session."""
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
        """Run one turn and yield its events as they come. It begins when the first event is asked for."""
        return AsyncStream(self, Following(prompt, user_id, session_id, agent_id, options, self._retrying))

    async def spawn(self, user_id: str, *, wait: bool = True, **options: Unpack[SpawnOptions]) -> AgentView:
        """Start an agent of this user's own; with `wait`, return when it answers."""
        return await self._run(calls.spawn(user_id, options, wait))

    async def agents(self, user_id: str | None = None) -> AgentList:
        """List live agents: this user's, or all."""
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
        """Sum tokens and cost; days as YYYY-MM-DD, both included."""
        return await self._run(calls.usage(user_id, since, until))

    async def sessions(
        self, user_id: str | None = None, *, after: str | None = None, limit: int | None = None
    ) -> SessionList:
        """List a page of the sessions that have not ended; `after`: an earlier answer's `next`."""
        return await self._run(calls.sessions(user_id, after, limit))

    async def session(
        self, session_id: str, *, history: int = HISTORY_PAGE, before: int | None = None
    ) -> SessionDetail:
        """Show one session and its newest messages, at most `history`; `before`: an earlier answer's `history_next`."""
        return await self._run(calls.session(session_id, history, before))

    async def events(self, session_id: str, *, after: str | None = None, limit: int = 100) -> SessionEvents:
        """List a page of a session's log, wherever it is: what comes after an event's id, or from the start."""
        return await self._run(calls.session_events(session_id, after, limit))

    async def delete_session(self, session_id: str) -> SessionDeleted:
        """End one session for good."""
        return await self._run(calls.delete_session(session_id))

    async def interrupt(self, session_id: str) -> InterruptResponse:
        """Interrupt the turn that runs in a session."""
        return await self._run(calls.interrupt(session_id))

    async def logs(self, agent_id: str, *, limit: int = 65536) -> str:
        """Return the end of what an agent printed, at most `limit` bytes (1 to 1,048,576)."""
        return (await self._read_tried(calls.logs(agent_id, limit)))[1].decode(errors="replace")

    async def follow_logs(self, agent_id: str, *, tail: int = 100, every: float = 0.5) -> AsyncIterator[str]:
        """Yield the last `tail` lines that an agent printed, then each new one, until the agent is over.

        Looks every `every` seconds; a line comes once it is whole, without its end. A log goes with its agent:
        what an agent prints after the last look before its end does not come.
        """
        seen = Tail(tail)
        while True:
            lines = seen.feed((await self._read_tried(calls.logs(agent_id, WINDOW)))[1])
            for line in lines:
                yield line
            if not lines and is_over(await self.agent(agent_id)):
                for line in seen.rest():
                    yield line
                return
            await asyncio.sleep(every)

    async def get(self, path: str) -> tuple[Mapping[str, str], bytes]:
        """Read a page that this client has no method for; returns its headers and its body."""
        return await self._read_tried(calls.page(path))

    async def files(self, session_id: str, *, after: str | None = None, limit: int | None = None) -> FileList:
        """List a page of the files of a session's workspace; `after`: an earlier answer's `next`."""
        return await self._run(calls.files(session_id, after, limit))

    async def read_file(self, session_id: str, path: str) -> bytes:
        """Return a file of a session's workspace; `path` is relative to it."""
        return (await self._read_tried(calls.read_file(session_id, path)))[1]

    async def delete_file(self, session_id: str, path: str) -> FileDeleted:
        """Delete a file, a link or an empty folder of a session's workspace."""
        return await self._run(calls.delete_file(session_id, path))

    async def write_file(self, session_id: str, path: str, content: bytes) -> FileWritten:
        """Put a file into a session's workspace, over the one there was."""
        return await self._run(calls.write_file(session_id, path, content))

    async def resolve_approval(
        self, session_id: str, approval_id: str, *, allow: bool, message: str | None = None
    ) -> ApprovalResolved:
        """Allow or deny a tool call that waits for its user; `message` goes with a no, to the model."""
        return await self._run(calls.resolve_approval(session_id, approval_id, allow, message))

    async def _run(self, call: Call[T]) -> T:
        return calls.answered(call, self.url, (await self._read_tried(call))[1])

    async def _read_tried(self, call: Call[Any]) -> tuple[Mapping[str, str], bytes]:
        tries = Tries(self._retrying)
        while True:
            try:
                answer = await self._send(call, {}, call.seconds)
                try:
                    return answer.headers, await _read(answer)
                finally:
                    answer.release()
            except (ServerError, Unreachable) as error:
                pause = tries.pause(error, repeatable=call.repeatable, seconds=call.seconds)
                if pause is None:
                    raise
            await asyncio.sleep(pause)

    async def _send(self, call: Call[Any], extra: Mapping[str, str], silence: float) -> "aiohttp.ClientResponse":
        """Send once and return the answer, its body unread. Raises ServerError and Unreachable."""
        import aiohttp

        # A kept-alive connection may be dead without notice; then nobody knows whether the request arrived.
        fresh = not call.repeatable and self._retrying.attempts > 1
        try:
            answer = await self._session(fresh=fresh).request(
                call.method,
                self.url + call.path,
                data=call.body,
                headers=calls.headers(call, self._door.token, extra),
                timeout=aiohttp.ClientTimeout(total=None, connect=_CONNECT_SECONDS, sock_read=silence),
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as error:
            sent = not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
            raise Unreachable(f"{self.url} gave no answer: {_said(error)}", sent=sent) from error
        if answer.status >= 400:
            async with answer:
                raise error_of(answer.status, answer.headers, await _read(answer))
        return answer

    def _session(self, *, fresh: bool) -> "aiohttp.ClientSession":
        """Return a session of connections that are kept alive, or of such as serve one request each."""
        import aiohttp

        found = self._fresh if fresh else self._http
        if found is None:
            tls = self._tls if self._tls is not None else True
            connector = aiohttp.TCPConnector(limit=self._connections, ssl=tls, force_close=fresh)
            found = aiohttp.ClientSession(connector=connector)
            if fresh:
                self._fresh = found
            else:
                self._http = found
        return found

    async def _leave(self, turn: Following) -> None:
        """Interrupt a turn that its reader leaves."""
        open_sessions = self._http is not None or self._fresh is not None
        abandoned = turn.abandoned() if open_sessions else None
        if abandoned is not None:
            with contextlib.suppress(ClientError, TimeoutError):
                async with asyncio.timeout(abandoned.seconds):
                    (await self._send(abandoned, {}, abandoned.seconds)).close()


class AsyncStream:
    """The events of one turn. Iterate it, or its `text()`; `result()` afterwards. `close()` ends it early.

    Leave it by `async with`, or close the client: after a bare `break` the turn is interrupted only when Python throws
    the stream away.
    """

    def __init__(self, client: AsyncClient, turn: Following) -> None:
        self._client = client
        self._turn = turn
        self._events = _follow(client, turn)  # knows nothing of this object, so that both go when nobody has them

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.close()

    @property
    def session_id(self) -> str | None:
        """The session's id, known from the first event on."""
        return self._turn.reader.session_id

    async def result(self) -> ChatResponse:
        """Return the turn's result; reads the stream to its end first."""
        async for _ in self._events:
            pass
        return self._turn.result()

    async def text(self) -> AsyncIterator[str]:
        """Yield the answer's text in pieces, each once.

        Raises StreamLost, with `result()` still to be had, when the answer began again in other words than were given
        (a `reset`), or when the log of a lost stream does not hold all of it.
        """
        pieces = Pieces(self._turn.reader)
        async for event in self._events:
            if piece := pieces.of(event):
                yield piece

    async def close(self) -> None:
        """Close the connection, and interrupt a turn that has not ended, unless `on_disconnect` was given."""
        await self._events.aclose()
        await self._client._leave(self._turn)


async def _follow(client: AsyncClient, turn: Following) -> AsyncGenerator[Event, None]:
    import aiohttp

    answer: aiohttp.ClientResponse | None = None
    client._following.add(turn)
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
        await client._leave(turn)
        raise
    finally:
        client._following.discard(turn)
        if answer is not None:
            answer.close()


async def _read(answer: "aiohttp.ClientResponse") -> bytes:
    import aiohttp

    try:
        return await answer.read()
    except (aiohttp.ClientError, OSError) as error:
        raise Unreachable(f"the answer broke off: {_said(error)}", sent=True) from error


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
