"""A client that opens many event streams and measures the time from `connect` to the first event of each.

Run as `python relay_streams.py PORT COUNT OVER HOST`. Prints one JSON line: failures, seconds to the first event of
every stream, the duration of opening, and the CPU seconds of the client. It shares the machine with the measured
processes, so it is one loop over epoll and sockets: the transports of an event loop would cost more than the streams.
"""

import contextlib
import json
import select
import socket
import sys
import time
from dataclasses import dataclass

EVENTS = 20
TOKEN = "benchmark-token-0123456789abcdef"
REQUEST = f"GET /stream HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {TOKEN}\r\n\r\n".encode()
MAX_SECONDS = 90.0


@dataclass(slots=True)
class Stream:
    """One open stream."""

    socket: socket.socket
    began: float
    events: int = 0
    first: float | None = None


class Client:
    """Opens streams evenly over `over` seconds, and reads them."""

    def __init__(self, port: int, count: int, over: float, host: str) -> None:
        self._target = ("127.0.0.1", port)
        self._source = (host, 0)
        self._count = count
        self._over = over
        self._poll = select.epoll()
        self._open: dict[int, Stream] = {}
        self._buffer = bytearray(65536)
        self._opened = 0
        self.failed = 0
        self.firsts: list[float] = []
        self.opened_over = 0.0

    def run(self) -> None:
        """Run until every stream has ended, or for `MAX_SECONDS` after the last one was to be opened."""
        began = time.perf_counter()
        while self._opened < self._count or self._open:
            now = time.perf_counter()
            if now - began > self._over + MAX_SECONDS:
                self.failed += len(self._open) + self._count - self._opened
                return
            due = min(self._count, int((now - began) / self._over * self._count) + 1)
            while self._opened < due:
                self._opened += 1
                self._begin()
                self.opened_over = time.perf_counter() - began
            for descriptor, _ in self._poll.poll(0.001 if self._opened < self._count else 1.0):
                self._read(self._open[descriptor])

    def _begin(self) -> None:
        try:
            one = socket.socket()
            one.bind(self._source)
            stream = Stream(one, time.perf_counter())
            one.connect(self._target)  # on loopback, the connection exists when the call returns
            one.send(REQUEST)
            one.setblocking(False)
        except OSError:
            self.failed += 1
            return
        self._open[one.fileno()] = stream
        self._poll.register(one.fileno(), select.EPOLLIN)

    def _read(self, stream: Stream) -> None:
        size = 0
        with contextlib.suppress(OSError):
            size = stream.socket.recv_into(self._buffer)
        events = self._buffer.count(b"data: ", 0, size)
        if events and stream.first is None:
            stream.first = time.perf_counter() - stream.began
        stream.events += events
        if size and stream.events < EVENTS:
            return
        del self._open[stream.socket.fileno()]
        stream.socket.close()
        if stream.first is None or stream.events < EVENTS:
            self.failed += 1
        else:
            self.firsts.append(stream.first)


def main() -> None:
    """Run from the command line."""
    used = time.process_time()
    client = Client(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
    client.run()
    found = {"failed": client.failed, "first": client.firsts, "opened_over": client.opened_over}
    print(json.dumps({**found, "cpu": time.process_time() - used}))


if __name__ == "__main__":
    main()
