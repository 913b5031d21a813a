"""The synchronous client: standard library only, one connection per call, safe to share between threads."""

import contextlib
import http.client
import ssl
import time
from collections.abc import Generator, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

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

T = TypeVar("T", bound=BaseModel)
_CONNECT_SECONDS = 10.0


class Client:
    """Client of the platform. `url` and `token` default to HYPERCORE_AGENTS_URL and HYPERCORE_AGENTS_TOKEN.

    It holds no connection between calls, so closing it is optional.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        retrying: Retrying | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._endpoint = endpoint(url, token)
        self._retrying = retrying or Retrying()
        self._tls = tls

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Do nothing; exists for symmetry with `AsyncClient`."""

    @property
    def url(self) -> str:
        """The base URL of the platform."""
        return self._endpoint.url

    def chat(
        self,
        prompt: str,
        *,
        user_id: str,
        session_id: str | None = None,
        agent_id: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatResponse:
        """Run one turn and return its result. Without `session_id`, the turn starts a new session."""
        return self._run(calls.chat(prompt, user_id, session_id, agent_id, options, stream=False))

    def stream(
        self,
        prompt: str,
        *,
        user_id: str,
        session_id: str | None = None,
        agent_id: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> "Stream":
        """Run one turn and yield its events as they arrive. The turn starts with the first iteration."""
        return Stream(self, TurnStream(prompt, user_id, session_id, agent_id, options, self._retrying))

    def spawn(self, user_id: str, *, wait: bool = True, **options: Unpack[SpawnOptions]) -> AgentView:
        """Start a dedicated agent of this user; with `wait`, return when it is ready."""
        return self._run(calls.spawn(user_id, options, wait))

    def agents(self, user_id: str | None = None) -> AgentList:
        """List live agents of one user, or of all users."""
        return self._run(calls.agents(user_id))

    def agent(self, agent_id: str) -> AgentView:
        """Show one agent."""
        return self._run(calls.agent(agent_id))

    def delete_agent(self, agent_id: str) -> AgentDeleted:
        """Stop one agent and end its sessions."""
        return self._run(calls.delete_agent(agent_id))

    def stats(self) -> StatsView:
        """Count agents, sessions and capacity."""
        return self._run(calls.stats())

    def usage(self, user_id: str | None = None, *, since: str | None = None, until: str | None = None) -> UsageReport:
        """Sum tokens and cost; `since` and `until` are days as YYYY-MM-DD, inclusive."""
        return self._run(calls.usage(user_id, since, until))

    def sessions(
        self, user_id: str | None = None, *, after: str | None = None, limit: int | None = None
    ) -> SessionList:
        """List a page of the sessions that have not ended; `after` is `next` of the previous page."""
        return self._run(calls.sessions(user_id, after, limit))

    def session(self, session_id: str, *, history: int = HISTORY_PAGE, before: int | None = None) -> SessionDetail:
        """Show one session and its newest `history` messages; `before` is `history_next` of the previous answer."""
        return self._run(calls.session(session_id, history, before))

    def events(self, session_id: str, *, after: str | None = None, limit: int = 100) -> SessionEvents:
        """List a page of a session's event log: the events after an event id, or from the start."""
        return self._run(calls.session_events(session_id, after, limit))

    def delete_session(self, session_id: str) -> SessionDeleted:
        """End one session permanently."""
        return self._run(calls.delete_session(session_id))

    def interrupt(self, session_id: str) -> InterruptResponse:
        """Interrupt the running turn of a session."""
        return self._run(calls.interrupt(session_id))

    def logs(self, agent_id: str, *, limit: int = 65536) -> str:
        """Return the end of an agent's log, at most `limit` bytes (1 to 1,048,576)."""
        return self._read_with_retries(calls.logs(agent_id, limit))[1].decode(errors="replace")

    def follow_logs(self, agent_id: str, *, tail: int = 100, every: float = 0.5) -> Iterator[str]:
        """Yield the last `tail` lines of an agent's log, then each new line, until the agent ends.

        Polls every `every` seconds and yields complete lines without their line ends. The log is removed with its
        agent: lines after the last poll before its end are not yielded.
        """
        log = LogTail(tail)
        while True:
            lines = log.feed(self._read_with_retries(calls.logs(agent_id, WINDOW))[1])
            yield from lines
            if not lines and has_ended(self.agent(agent_id)):
                yield from log.rest()
                return
            time.sleep(every)

    def get(self, path: str) -> tuple[Mapping[str, str], bytes]:
        """Get any other path; return the headers and the body of the answer."""
        return self._read_with_retries(calls.page(path))

    def files(self, session_id: str, *, after: str | None = None, limit: int | None = None) -> FileList:
        """List a page of the files of a session's workspace; `after` is `next` of the previous page."""
        return self._run(calls.files(session_id, after, limit))

    def read_file(self, session_id: str, path: str) -> bytes:
        """Return a file of a session's workspace; `path` is relative to it."""
        return self._read_with_retries(calls.read_file(session_id, path))[1]

    def delete_file(self, session_id: str, path: str) -> FileDeleted:
        """Delete a file, a link or an empty folder of a session's workspace."""
        return self._run(calls.delete_file(session_id, path))

    def write_file(self, session_id: str, path: str, content: bytes) -> FileWritten:
        """Write a file into a session's workspace, replacing an existing one."""
        return self._run(calls.write_file(session_id, path, content))

    def resolve_approval(
        self, session_id: str, approval_id: str, *, allow: bool, message: str | None = None
    ) -> ApprovalResolved:
        """Allow or deny a tool call that waits for a decision; the model receives `message` with a denial."""
        return self._run(calls.resolve_approval(session_id, approval_id, allow, message))

    def _run(self, call: Call[T]) -> T:
        return calls.answered(call, self.url, self._read_with_retries(call)[1])

    def _read_with_retries(self, call: Call[Any]) -> tuple[Mapping[str, str], bytes]:
        retries = Retries(self._retrying)
        while True:
            try:
                with contextlib.closing(self._send(call, {})) as answer:
                    return dict(answer.headers), _read(answer)
            except (ServerError, Unreachable) as error:
                pause = retries.pause(error, repeatable=call.repeatable, seconds=call.seconds)
                if pause is None:
                    raise
            time.sleep(pause)

    def _send(
        self, call: Call[Any], extra: Mapping[str, str], silence: float | None = None
    ) -> http.client.HTTPResponse:
        """Send one request and return the answer with its body unread. Raises ServerError and Unreachable."""
        target = self._endpoint
        connection = (
            http.client.HTTPSConnection(target.host, target.port, timeout=_CONNECT_SECONDS, context=self._tls)
            if target.secure
            else http.client.HTTPConnection(target.host, target.port, timeout=_CONNECT_SECONDS)
        )
        sent = False
        try:
            connection.connect()
            connection.sock.settimeout(silence or call.seconds)
            sent = True
            headers = {**calls.headers(call, target.token, extra), "Connection": "close"}
            connection.request(call.method, target.prefix + call.path, call.body, headers)
            answer = connection.getresponse()
            if answer.status >= 400:
                raise error_of(answer.status, dict(answer.headers), _read(answer))
            return answer
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise Unreachable(f"{self.url} did not answer: {_text(error)}", sent=sent) from error
        except BaseException:
            connection.close()
            raise

    def _interrupt_unfinished(self, turn: TurnStream) -> None:
        """Interrupt a turn whose stream is closed early."""
        interruption = turn.interrupt_call()
        if interruption is not None:
            with contextlib.suppress(ClientError):
                self._send(interruption, {}).close()


class Stream:
    """The events of one turn. Iterate over it or over `text()`, then read `result`; `close()` ends it early.

    Use `with` to leave a stream early; leaving it interrupts the turn. After a plain `break` the turn is interrupted
    only when the stream is garbage-collected.
    """

    def __init__(self, client: Client, turn: TurnStream) -> None:
        self._client = client
        self._turn = turn
        self._events = _follow(client, turn)  # holds no reference to this object, so that both can be collected

    def __iter__(self) -> Iterator[Event]:
        return self._events

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    @property
    def session_id(self) -> str | None:
        """The session's id, known after the first event."""
        return self._turn.reader.session_id

    @property
    def result(self) -> ChatResponse:
        """The result of the turn; reading it reads the rest of the stream."""
        for _ in self._events:
            pass
        return self._turn.result()

    def text(self) -> Iterator[str]:
        """Yield the text of the answer in pieces, each exactly once.

        Raises StreamLost if the answer restarted with a different text (a `reset`), or if the log of a lost stream does
        not hold all of it; `result` still works.
        """
        pieces = TextPieces(self._turn.reader)
        for event in self._events:
            if piece := pieces.of(event):
                yield piece

    def close(self) -> None:
        """Close the connection, and interrupt an unfinished turn unless `on_disconnect` was set."""
        self._events.close()
        self._client._interrupt_unfinished(self._turn)


def _follow(client: Client, turn: TurnStream) -> Generator[Event, None, None]:
    answer: http.client.HTTPResponse | None = None
    try:
        while not turn.reader.ended:
            try:
                if answer is None:
                    answer = client._send(*turn.next(), SILENCE_SECONDS)
                while not turn.reader.ended:
                    yield from turn.feed(answer.read1(65536))
            except (OSError, http.client.HTTPException, ClientError) as error:
                if answer is not None:
                    answer.close()
                    answer = None
                time.sleep(turn.pause(error))
    except (GeneratorExit, KeyboardInterrupt):
        if answer is not None:
            answer.close()
        client._interrupt_unfinished(turn)
        raise
    finally:
        if answer is not None:
            answer.close()


def _read(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"the answer was cut off: {_text(error)}", sent=True) from error


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
