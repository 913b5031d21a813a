"""Answering a chat on bare ASGI: JSON or server-sent events, and noticing that the client went away.

Bare ASGI, because the framework's streaming response puts a task group between every chunk and the socket, and notices
a lost client only while it sends. Here one event wakes the response: frames to send, the turn's end, a lost client, or
15 s of silence.
"""

import asyncio
import contextlib
from dataclasses import dataclass

import structlog

from hypercore_agents.agent.persistence.event_ring import EventLog
from hypercore_agents.agent.sessions.registry import Outcome
from hypercore_agents.agent.sessions.send_buffer import SendBuffer
from hypercore_agents.agent.sessions.turn import Turn
from hypercore_agents.api.chat import ChatResponse
from hypercore_agents.api.errors import InternalError
from hypercore_agents.api.events import KEEPALIVE, KEEPALIVE_SECONDS, EventId, encode
from hypercore_agents.http.context import Receive, Scope, Send, request_id_of
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.kit.relay.raw_response import cut
from hypercore_agents.observability.metrics import AgentMetrics

_log = structlog.get_logger(__name__)
_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
WRITE_SECONDS = 60.0
"""How long one write may wait for a client that does not read."""


@dataclass
class Reply:
    """The answer to one chat, as an ASGI application. A domain error before the first byte is raised."""

    turn: Turn
    task: "asyncio.Task[Outcome]"
    tasks: Tasks
    metrics: AgentMetrics
    silence: float = KEEPALIVE_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; a client that goes away stops its turn."""
        wake = self.turn.frames.added if self.turn.frames is not None else asyncio.Event()
        client = self.tasks.start("watch-client", _until_gone(receive))
        for watched in (client, self.task):
            watched.add_done_callback(lambda _: wake.set())
        try:
            if self.turn.frames is None:
                await wake.wait()
                if self.task.done():
                    await self._json(scope, send)
                    return
            elif await self._events(self.turn.frames, wake, client, scope, send):
                return
            self._lost(scope)
        finally:
            client.cancel()
            if not self.task.done():
                self.turn.stop("gone")

    async def _json(self, scope: Scope, send: Send) -> None:
        body = self._response(scope).model_dump_json().encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _events(
        self, frames: SendBuffer, wake: asyncio.Event, client: "asyncio.Task[None]", scope: Scope, send: Send
    ) -> bool:
        """Send the stream to its end; False when the client was lost on the way."""
        loop = asyncio.get_running_loop()
        begun = False
        sent_at = loop.time()
        timer = loop.call_at(sent_at + self.silence, wake.set)
        try:
            while True:
                await wake.wait()
                wake.clear()
                ended = self.task.done()
                data = frames.take()
                if client.done():
                    return False
                if not begun and not data:
                    if ended:
                        await self._early_end(scope, send)
                        return True
                    if loop.time() >= timer.when():
                        timer = loop.call_at(loop.time() + self.silence, wake.set)
                    continue
                if not begun:
                    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                    begun = True
                if ended:
                    data += self._last(scope)
                elif not data and loop.time() < sent_at + self.silence:
                    if timer.when() <= loop.time():
                        timer = loop.call_at(sent_at + self.silence, wake.set)
                    continue
                async with asyncio.timeout(WRITE_SECONDS):
                    await send({"type": "http.response.body", "body": data or KEEPALIVE, "more_body": not ended})
                if ended:
                    return True
                sent_at = loop.time()
                if timer.when() <= sent_at:
                    timer = loop.call_at(sent_at + self.silence, wake.set)
        except TimeoutError:
            cut(scope)
            return False
        finally:
            timer.cancel()

    async def _early_end(self, scope: Scope, send: Send) -> None:
        """The turn ended before its first event: raise its error, or tell the little there is."""
        self._response(scope)
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": self._last(scope)})

    def _last(self, scope: Scope) -> bytes:
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
            return InternalError("an internal error; the agent's log has it under this request_id")
        return self.task.result()

    def _lost(self, scope: Scope) -> None:
        scope["state"]["outcome"] = 0
        _log.info("chat.client_gone", session_id=self.turn.session.session_id, turn=self.turn.number)


@dataclass
class Follow:
    """A session's events from the one that the client saw last, as they come, as an ASGI application."""

    log: EventLog
    last: EventId | None
    tasks: Tasks
    silence: float = KEEPALIVE_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the client goes, or the session."""
        writing = self.tasks.start("follow-events", self._write(scope, send))
        client = self.tasks.start("watch-client", _until_gone(receive))
        try:
            await asyncio.wait((writing, client), return_when=asyncio.FIRST_COMPLETED)
        finally:
            client.cancel()
            writing.cancel()

    async def _write(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            async with contextlib.aclosing(self.log.follow(self.last, silence=self.silence)) as events:
                async for frames in events:
                    async with asyncio.timeout(WRITE_SECONDS):
                        await send({"type": "http.response.body", "body": frames or KEEPALIVE, "more_body": True})
            async with asyncio.timeout(WRITE_SECONDS):
                await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            cut(scope)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
