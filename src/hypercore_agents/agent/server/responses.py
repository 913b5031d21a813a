"""Chat responses on bare ASGI: JSON or server-sent events (SSE), and the detection of disconnected clients.

Bare ASGI, because the framework's streaming response puts a task group between each chunk and the socket, and notices
a disconnected client only while it sends. Here one asyncio event wakes the response: for frames to send, the turn's
end, a disconnected client, or a keep-alive comment after 15 s without frames.
"""

import asyncio
import contextlib
from dataclasses import dataclass

import structlog

from hypercore_agents.agent.persistence.event_ring import EventRing
from hypercore_agents.agent.sessions.send_buffer import SendBuffer
from hypercore_agents.agent.sessions.turn import Outcome, Turn
from hypercore_agents.api.chat import ChatResponse
from hypercore_agents.api.errors import InternalError
from hypercore_agents.api.events import KEEPALIVE, KEEPALIVE_SECONDS, EventId, encode
from hypercore_agents.http.context import Receive, Scope, Send, request_id_of
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.kit.relay.raw_response import abort_connection
from hypercore_agents.observability.metrics import AgentMetrics

_log = structlog.get_logger(__name__)
_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
WRITE_SECONDS = 60.0
"""How long one write waits for a client that does not read."""


@dataclass
class ChatReply:
    """The response to one chat request, as an ASGI application. Raises a domain error before the first byte."""

    turn: Turn
    task: "asyncio.Task[Outcome]"
    tasks: Tasks
    metrics: AgentMetrics
    keepalive_seconds: float = KEEPALIVE_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond; a client that disconnects stops its turn."""
        wake = self.turn.send_buffer.added if self.turn.send_buffer is not None else asyncio.Event()
        client = self.tasks.start("watch-client", _until_disconnected(receive))
        for watched in (client, self.task):
            watched.add_done_callback(lambda _: wake.set())
        try:
            if self.turn.send_buffer is None:
                await wake.wait()
                if self.task.done():
                    await self._send_json(scope, send)
                    return
            elif await self._send_events(self.turn.send_buffer, wake, client, scope, send):
                return
            self._note_disconnect(scope)
        finally:
            client.cancel()
            if not self.task.done():
                self.turn.stop("disconnect")

    async def _send_json(self, scope: Scope, send: Send) -> None:
        body = self._response(scope).model_dump_json().encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _send_events(
        self, send_buffer: SendBuffer, wake: asyncio.Event, client: "asyncio.Task[None]", scope: Scope, send: Send
    ) -> bool:
        """Send the whole stream; return False when the client disconnects first."""
        loop = asyncio.get_running_loop()
        started = False
        sent_at = loop.time()
        timer = loop.call_at(sent_at + self.keepalive_seconds, wake.set)
        try:
            while True:
                await wake.wait()
                wake.clear()
                ended = self.task.done()
                data = send_buffer.take()
                if client.done():
                    return False
                if not started and not data:
                    if ended:
                        await self._send_last_event(scope, send)
                        return True
                    if loop.time() >= timer.when():
                        timer = loop.call_at(loop.time() + self.keepalive_seconds, wake.set)
                    continue
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                    started = True
                if ended:
                    data += self._last_event(scope)
                elif not data and loop.time() < sent_at + self.keepalive_seconds:
                    if timer.when() <= loop.time():
                        timer = loop.call_at(sent_at + self.keepalive_seconds, wake.set)
                    continue
                async with asyncio.timeout(WRITE_SECONDS):
                    await send({"type": "http.response.body", "body": data or KEEPALIVE, "more_body": not ended})
                if ended:
                    return True
                sent_at = loop.time()
                if timer.when() <= sent_at:
                    timer = loop.call_at(sent_at + self.keepalive_seconds, wake.set)
        except TimeoutError:
            abort_connection(scope)
            return False
        finally:
            timer.cancel()

    async def _send_last_event(self, scope: Scope, send: Send) -> None:
        """Raise the error of a turn that ended before its first event, or send its last event alone."""
        self._response(scope)
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": self._last_event(scope)})

    def _last_event(self, scope: Scope) -> bytes:
        outcome = self._outcome()
        if isinstance(outcome, ChatResponse):
            return encode(outcome, self.turn.last_id or None)
        self.metrics.errors.labels(outcome.type).inc()
        scope["state"]["outcome"], scope["state"]["error_type"] = outcome.status, outcome.type
        return encode(outcome.body(request_id_of(scope)), self.turn.last_id or None)

    def _response(self, scope: Scope) -> ChatResponse:
        outcome = self._outcome()
        if isinstance(outcome, ChatResponse):
            return outcome
        raise outcome

    def _outcome(self) -> Outcome:
        if self.task.cancelled() or self.task.exception() is not None:
            return InternalError("internal error; search the agent's log for this request_id")
        return self.task.result()

    def _note_disconnect(self, scope: Scope) -> None:
        scope["state"]["outcome"] = 0
        _log.info("chat.client_gone", session_id=self.turn.session.session_id, turn=self.turn.number)


@dataclass
class EventFollower:
    """A session's events after the last one that the client saw, as they come, as an ASGI application."""

    ring: EventRing
    last: EventId | None
    tasks: Tasks
    keepalive_seconds: float = KEEPALIVE_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the client disconnects or the session leaves this agent."""
        writing = self.tasks.start("follow-events", self._write(scope, send))
        client = self.tasks.start("watch-client", _until_disconnected(receive))
        try:
            await asyncio.wait((writing, client), return_when=asyncio.FIRST_COMPLETED)
        finally:
            client.cancel()
            writing.cancel()

    async def _write(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            async with contextlib.aclosing(
                self.ring.follow(self.last, keepalive_seconds=self.keepalive_seconds)
            ) as events:
                async for frames in events:
                    async with asyncio.timeout(WRITE_SECONDS):
                        await send({"type": "http.response.body", "body": frames or KEEPALIVE, "more_body": True})
            async with asyncio.timeout(WRITE_SECONDS):
                await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            abort_connection(scope)


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
