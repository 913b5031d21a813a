"""A client that opens many event streams and times each one's first event.

Run as `python relay_streams.py PORT COUNT OVER HOST`. Prints one JSON line:
failures, and seconds to first event for every stream. On bare protocols, since it shares
the machine with what it measures.
"""

import asyncio
import json
import sys
import time
from typing import cast

import uvloop
from relay_processes import EVENTS, TOKEN


class Stream(asyncio.Protocol):
    """One stream: sends the request, counts events, remembers when the first one came."""

    def __init__(self, done: asyncio.Future[float | None]) -> None:
        self._done = done
        self._events = 0
        self._began = 0.0
        self._first: float | None = None
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._began = time.perf_counter()
        request = f"GET /stream HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {TOKEN}\r\n\r\n"
        cast(asyncio.Transport, transport).write(request.encode())

    def data_received(self, data: bytes) -> None:
        events = data.count(b"data: ")
        if events and self._first is None:
            self._first = time.perf_counter() - self._began
        self._events += events
        if self._events >= EVENTS and self._transport is not None:
            self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result(self._first if self._events >= EVENTS else None)


async def run(port: int, count: int, over: float, host: str) -> dict[str, object]:
    """Open `count` streams evenly over `over` seconds."""
    loop = asyncio.get_running_loop()
    began = time.perf_counter()

    async def one(number: int) -> float | None:
        await asyncio.sleep(max(0.0, number * over / count - (time.perf_counter() - began)))
        done: asyncio.Future[float | None] = loop.create_future()
        try:
            await loop.create_connection(lambda: Stream(done), "127.0.0.1", port, local_addr=(host, 0))
            return await asyncio.wait_for(done, 90)
        except (OSError, TimeoutError):
            return None

    firsts = await asyncio.gather(*(one(number) for number in range(count)))
    return {"failed": sum(first is None for first in firsts), "first": [first for first in firsts if first is not None]}


if __name__ == "__main__":
    port, count, over, host = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    print(json.dumps(uvloop.run(run(port, count, over, host))))
