"""Send an answer at its pace and inject its fault.

A stream costs one coroutine, one timer and one write per piece. Due times are absolute, so a delay does not
accumulate; pieces that are due at the same time are sent in one write.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from hypercore_agents.simulator import frames
from hypercore_agents.simulator.answers import Answer
from hypercore_agents.simulator.connection import Connection
from hypercore_agents.simulator.counts import Counts
from hypercore_agents.simulator.directives import Fault
from hypercore_agents.simulator.failures import ApiFailure, failure_body

Send = Callable[[dict[str, Any]], Awaitable[None]]
_LARGEST_WRITE = 64 * 1024
_MESSAGES = {
    401: "invalid x-api-key",
    429: "This request would exceed the rate limit (injected fault)",
    529: "Overloaded",
}


class Sender:
    """Sends answers to one client. `hang_limit` is in seconds."""

    def __init__(self, send: Send, connection: Connection, counts: Counts, request_id: str, hang_limit: float) -> None:
        self._send = send
        self._connection = connection
        self._counts = counts
        self._request_id = request_id
        self._hang_limit = hang_limit
        self._loop = asyncio.get_running_loop()

    async def message(self, answer: Answer) -> None:
        """Send an answer as one JSON body at the time when its last token is due."""
        pause = answer.ttft + (answer.output_tokens / answer.rate if answer.rate else 0.0)
        if pause and not await self._connection.sleep_until(self._loop.time() + pause):
            return
        body = frames.message(answer)
        if answer.fault is not None:
            await self._fail(answer.fault, body)
            return
        await self.json(200, body)
        self._counts.tokens(answer.output_tokens)

    async def stream(self, answer: Answer) -> None:
        """Send an answer as server-sent events."""
        self._counts.opened()
        try:
            await self._stream(answer)
        finally:
            self._counts.closed()

    async def json(self, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        """Send a JSON body."""
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, b"application/json", (length, *headers))
        await self._send({"type": "http.response.body", "body": body})

    async def failure(self, failure: ApiFailure) -> None:
        """Send an error."""
        headers: tuple[tuple[bytes, bytes], ...] = ()
        if failure.retry_after is not None:
            headers = ((b"retry-after", f"{failure.retry_after:g}".encode()),)
        await self.json(failure.status, failure_body(failure, self._request_id), headers)

    async def _stream(self, answer: Answer) -> None:
        fault = answer.fault
        due = self._loop.time() + answer.ttft
        if answer.ttft and not await self._connection.sleep_until(due):
            return
        if fault is not None and not fault.after and fault.kind != "cut":
            await self._fail(fault, b"")
            return
        interval = frames.tokens_per_delta(answer.rate) / answer.rate if answer.rate else 0.0
        await self._start(200, b"text/event-stream; charset=utf-8", ((b"cache-control", b"no-cache"),))
        ready, tokens = b"", 0
        for delta in frames.deltas(answer, fault.after if fault is not None else None):
            if interval and due > self._loop.time():
                await self._send_part(ready, tokens)
                ready, tokens = b"", 0
                if not await self._connection.sleep_until(due):
                    return
            ready += delta.data
            tokens += delta.tokens
            due += interval
            if len(ready) > _LARGEST_WRITE:
                await self._send_part(ready, tokens)
                ready, tokens = b"", 0
        if fault is None:
            self._counts.tokens(tokens)
            await self._send({"type": "http.response.body", "body": ready})
            return
        await self._send_part(ready, tokens)
        await self._break(fault)

    async def _send_part(self, data: bytes, tokens: int) -> None:
        if data:
            self._counts.tokens(tokens)
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _fail(self, fault: Fault, body: bytes) -> None:
        """Fail before the answer; `cut` sends half of `body` first."""
        self._counts.fault()
        if fault.status is not None:
            after = fault.retry_after if fault.status == 429 else None
            await self.failure(ApiFailure(fault.status, _message(fault.status), retry_after=after))
        elif fault.kind == "cut":
            await self._start(200, b"application/json", ((b"content-length", str(len(body)).encode()),))
            await self._send_part(body[: len(body) // 2], 0)
            await self._connection.cut()
        elif fault.kind == "refuse":
            await self._connection.reset()
        else:
            await self._hang()

    async def _break(self, fault: Fault) -> None:
        """Fail in the middle of a stream."""
        self._counts.fault()
        if fault.status is not None:
            body = failure_body(ApiFailure(fault.status, _message(fault.status)), self._request_id)
            await self._send({"type": "http.response.body", "body": frames.error_event(body)})
        elif fault.kind == "cut":
            await self._connection.cut()
        elif fault.kind == "refuse":
            await self._connection.reset()
        else:
            await self._hang()

    async def _hang(self) -> None:
        if await self._connection.sleep_until(self._loop.time() + self._hang_limit):
            await self._connection.reset()

    async def _start(self, status: int, content_type: bytes, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        identity = (b"request-id", self._request_id.encode())
        start = [(b"content-type", content_type), identity, *headers]
        await self._send({"type": "http.response.start", "status": status, "headers": start})


def _message(status: int) -> str:
    return _MESSAGES.get(status, f"Status {status} (injected fault)")
