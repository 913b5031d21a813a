"""The synchronous face: standard library only, one connection per call, so a client may be shared between threads."""

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
from hypercore_agents.client.log_tail import WINDOW, Tail, is_over
from hypercore_agents.client.retry_policy import Retrying, Tries
from hypercore_agents.client.settings import door
from hypercore_agents.client.streams import SILENCE_SECONDS, Event, Following, Pieces

T = TypeVar("T", bound=BaseModel)
_CONNECT_SECONDS = 10.0


class Client:
    """The platform, as one caller sees it. `url` and `token` default to HYPERCORE_AGENTS_URL and _TOKEN.

    It keeps no connection between calls, so that nothing is lost when it is not closed.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        retrying: Retrying | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._door = door(url, token)
        self._retrying = retrying or Retrying()
        self._tls = tls

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Do nothing: there as in `AsyncClient`, so that the one is exchanged for the other by its name alone."""

    @property
    def url(self) -> str:
        """The base URL that is called."""
        return self._door.url

    def chat(
        self,
        prompt: str,
        *,
        user_id: str,
        session_id: str | None = None,
        agent_id: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatResponse:
        """Run one turn and return its result; without `session_id`, of a new session."""
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
        """Run one turn and yield its events as they come. It begins when the first event is asked for."""
        return Stream(self, Following(prompt, user_id, session_id, agent_id, options, self._retrying))

    def spawn(self, user_id: str, *, wait: bool = True, **options: Unpack[SpawnOptions]) -> AgentView:
        """Start an agent of this user's own; with `wait`, return when it answers."""
        return self._run(calls.spawn(user_id, options, wait))

    def agents(self, user_id: str | None = None) -> AgentList:
        """List live agents: this user's, or all."""
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
        """Sum tokens and cost; days as YYYY-MM-DD, both included."""
        return self._run(calls.usage(user_id, since, until))

    def sessions(
        self, user_id: str | None = None, *, after: str | None = None, limit: int | None = None
    ) -> SessionList:
        """List a page of the sessions that have not ended; `after`: an earlier answer's `next`."""
        return self._run(calls.sessions(user_id, after, limit))

    def session(self, session_id: str, *, history: int = HISTORY_PAGE, before: int | None = None) -> SessionDetail:
        """Show one session and its newest messages, at most `history`; `before`: an earlier answer's `history_next`."""
        return self._run(calls.session(session_id, history, before))

    def events(self, session_id: str, *, after: str | None = None, limit: int = 100) -> SessionEvents:
        """List a page of a session's log, wherever it is: what comes after an event's id, or from the start."""
        return self._run(calls.session_events(session_id, after, limit))

    def delete_session(self, session_id: str) -> SessionDeleted:
        """End one session for good."""
        return self._run(calls.delete_session(session_id))

    def interrupt(self, session_id: str) -> InterruptResponse:
        """Interrupt the turn that runs in a session."""
        return self._run(calls.interrupt(session_id))

    def logs(self, agent_id: str, *, limit: int = 65536) -> str:
        """Return the end of what an agent printed, at most `limit` bytes (1 to 1,048,576)."""
        return self._read_tried(calls.logs(agent_id, limit))[1].decode(errors="replace")

    def follow_logs(self, agent_id: str, *, tail: int = 100, every: float = 0.5) -> Iterator[str]:
        """Yield the last `tail` lines that an agent printed, then each new one, until the agent is over.

        Looks every `every` seconds; a line comes once it is whole, without its end. A log goes with its agent:
        what an agent prints after the last look before its end does not come.
        """
        seen = Tail(tail)
        while True:
            lines = seen.feed(self._read_tried(calls.logs(agent_id, WINDOW))[1])
            yield from lines
            if not lines and is_over(self.agent(agent_id)):
                yield from seen.rest()
                return
            time.sleep(every)

    def get(self, path: str) -> tuple[Mapping[str, str], bytes]:
        """Read a page that this client has no method for; returns its headers and its body."""
        return self._read_tried(calls.page(path))

    def files(self, session_id: str, *, after: str | None = None, limit: int | None = None) -> FileList:
        """List a page of the files of a session's workspace; `after`: an earlier answer's `next`."""
        return self._run(calls.files(session_id, after, limit))

    def read_file(self, session_id: str, path: str) -> bytes:
        """Return a file of a session's workspace; `path` is relative to it."""
        return self._read_tried(calls.read_file(session_id, path))[1]

    def delete_file(self, session_id: str, path: str) -> FileDeleted:
        """Delete a file, a link or an empty folder of a session's workspace."""
        return self._run(calls.delete_file(session_id, path))

    def write_file(self, session_id: str, path: str, content: bytes) -> FileWritten:
        """Put a file into a session's workspace, over the one there was."""
        return self._run(calls.write_file(session_id, path, content))

    def resolve_approval(
        self, session_id: str, approval_id: str, *, allow: bool, message: str | None = None
    ) -> ApprovalResolved:
        """Allow or deny a tool call that waits for its user; `message` goes with a no, to the model."""
        return self._run(calls.resolve_approval(session_id, approval_id, allow, message))

    def _run(self, call: Call[T]) -> T:
        return calls.answered(call, self.url, self._read_tried(call)[1])

    def _read_tried(self, call: Call[Any]) -> tuple[Mapping[str, str], bytes]:
        tries = Tries(self._retrying)
        while True:
            try:
                with contextlib.closing(self._send(call, {})) as answer:
                    return dict(answer.headers), _read(answer)
            except (ServerError, Unreachable) as error:
                pause = tries.pause(error, repeatable=call.repeatable, seconds=call.seconds)
                if pause is None:
                    raise
            time.sleep(pause)

    def _send(
        self, call: Call[Any], extra: Mapping[str, str], silence: float | None = None
    ) -> http.client.HTTPResponse:
        """Send once and return the answer, its body unread. Raises ServerError and Unreachable."""
        door = self._door
        connection = (
            http.client.HTTPSConnection(door.host, door.port, timeout=_CONNECT_SECONDS, context=self._tls)
            if door.secure
            else http.client.HTTPConnection(door.host, door.port, timeout=_CONNECT_SECONDS)
        )
        sent = False
        try:
            connection.connect()
            connection.sock.settimeout(silence or call.seconds)
            sent = True
            headers = {**calls.headers(call, door.token, extra), "Connection": "close"}
            connection.request(call.method, door.prefix + call.path, call.body, headers)
            answer = connection.getresponse()
            if answer.status >= 400:
                raise error_of(answer.status, dict(answer.headers), _read(answer))
            return answer
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise Unreachable(f"{self.url} gave no answer: {_said(error)}", sent=sent) from error
        except BaseException:
            connection.close()
            raise

    def _leave(self, turn: Following) -> None:
        """Interrupt a turn that its reader leaves."""
        abandoned = turn.abandoned()
        if abandoned is not None:
            with contextlib.suppress(ClientError):
                self._send(abandoned, {}).close()


class Stream:
    """The events of one turn. Iterate it, or its `text()`; `result` is there afterwards. `close()` ends it early.

    Leave it by `with`: after a bare `break` the turn is interrupted only when Python throws the stream away.
    """

    def __init__(self, client: Client, turn: Following) -> None:
        self._client = client
        self._turn = turn
        self._events = _follow(client, turn)  # knows nothing of this object, so that both go when nobody has them

    def __iter__(self) -> Iterator[Event]:
        return self._events

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    @property
    def session_id(self) -> str | None:
        """The session's id, known from the first event on."""
        return self._turn.reader.session_id

    @property
    def result(self) -> ChatResponse:
        """The turn's result; reads the stream to its end first."""
        for _ in self._events:
            pass
        return self._turn.result()

    def text(self) -> Iterator[str]:
        """Yield the answer's text in pieces, each once.

        Raises StreamLost, with `result` still to be had, when the answer began again in other words than were given
        (a `reset`), or when the log of a lost stream does not hold all of it.
        """
        pieces = Pieces(self._turn.reader)
        for event in self._events:
            if piece := pieces.of(event):
                yield piece

    def close(self) -> None:
        """Close the connection, and interrupt a turn that has not ended, unless `on_disconnect` was given."""
        self._events.close()
        self._client._leave(self._turn)


def _follow(client: Client, turn: Following) -> Generator[Event, None, None]:
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
        client._leave(turn)
        raise
    finally:
        if answer is not None:
            answer.close()


def _read(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"the answer broke off: {_said(error)}", sent=True) from error


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
