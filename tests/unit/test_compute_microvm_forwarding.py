"""The forwarder of a VM when descriptors run out under many connections, with real sockets and limits."""

import contextlib
import errno
import os
import resource
import select
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from hypercore_agents.compute.microvm import forwarding
from hypercore_agents.compute.microvm.forwarding import Forwarder, Route

LOOPBACK = ("127.0.0.1", 0)


class Harness:
    """A forwarder with one route, and its owner's loop, which counts how often it is woken."""

    def __init__(self) -> None:
        self.target = socket.create_server(LOOPBACK, backlog=256)
        listener = socket.create_server(LOOPBACK, backlog=256)
        self.address = listener.getsockname()
        self.poll = select.epoll()
        self.forwarder = Forwarder(self.poll)
        self.route = Route(
            listener, self.target.getsockname(), lambda family: socket.socket(family, socket.SOCK_STREAM)
        )
        self.forwarder.open(self.route)
        self.opened: list[socket.socket] = []

    def turn(self, longest: float = 0.0) -> int:
        """Run one round of the loop; return the number of events."""
        pause = self.forwarder.seconds_until_resume()
        events = self.poll.poll(longest if pause is None else min(longest, pause))
        for descriptor, what in events:
            self.forwarder.handle(descriptor, what)
        self.forwarder.resume()
        return len(events)

    def until(self, wanted: Callable[[], bool], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not wanted():
            assert time.monotonic() < deadline
            self.turn(0.05)

    def connect(self) -> socket.socket:
        client = socket.create_connection(self.address)
        client.setblocking(False)
        self.opened.append(client)
        return client

    def forwards(self, client: socket.socket, far: socket.socket, word: bytes) -> None:
        """Check that data sent through the forwarder arrives at the other end."""
        client.sendall(word)
        far.setblocking(False)
        received = b""

        def arrived() -> bool:
            nonlocal received
            with contextlib.suppress(BlockingIOError):
                received += far.recv(64)
            return received == word

        self.until(arrived)

    def arrived(self) -> socket.socket:
        """Return the next connection at the target."""
        found, _ = self.target.accept()
        self.opened.append(found)
        return found

    def close(self) -> None:
        for client in self.opened:
            client.close()
        self.until(lambda: self.route.connections == 0)
        self.route.listener.close()
        self.target.close()
        self.poll.close()


@pytest.fixture
def harness() -> Iterator[Harness]:
    harness = Harness()
    yield harness
    harness.close()


@contextlib.contextmanager
def only(descriptors: int) -> Iterator[None]:
    """Limit this process to this number of further descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    filled = [os.open(os.devnull, os.O_RDONLY)]
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 64, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                filled.append(os.dup(filled[0]))
        for _ in range(descriptors):
            os.close(filled.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in filled:
            os.close(descriptor)


@pytest.mark.parametrize("left", [6, 7])
def test_without_descriptors_the_forwarder_pauses_accepting(harness: Harness, left: int) -> None:
    """With seven left, the fourth connection is accepted but gets no second socket; with six it is not accepted."""
    clients = [harness.connect() for _ in range(12)]
    with only(left):
        turns = 0
        while harness.turn():
            turns += 1
            assert turns < 100  # otherwise the waiting connections would wake it in a loop
        assert harness.route.connections == 3
        pause = harness.forwarder.seconds_until_resume()
        assert pause is not None
        assert 0 <= pause <= forwarding.PAUSE_SECONDS
    first = harness.arrived()
    harness.forwards(clients[0], first, b"still here")
    # Descriptors are available again: all waiting connections are accepted without a retry by their clients.
    waiting = 12 - 3 - (1 if left == 7 else 0)
    harness.until(lambda: harness.route.connections == 3 + waiting)
    assert harness.forwarder.seconds_until_resume() is None
    for _ in range(2 + waiting):
        last = harness.arrived()
    harness.forwards(clients[-1], last, b"after all")


def test_connections_beyond_limit_wait(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarding, "MAX_CONNECTIONS", 2)
    clients = [harness.connect() for _ in range(4)]
    turns = 0
    while harness.turn():
        turns += 1
        assert turns < 100
    assert harness.route.connections == 2
    clients[0].close()
    harness.arrived().close()
    harness.until(lambda: harness.route.connections == 2 and not harness.turn())
    harness.arrived()
    harness.forwards(clients[2], harness.arrived(), b"my turn")


def test_unwatchable_connections_close(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """epoll_ctl(2) returns ENOSPC at the limit of watched descriptors, which the whole host shares."""

    def full(self: Forwarder, side: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Forwarder, "_watch", full)
        client = harness.connect()
        while harness.turn():
            pass
        assert harness.route.connections == 0
        assert harness.forwarder.seconds_until_resume() is not None
    client.setblocking(True)
    client.settimeout(10)
    assert client.recv(1) == b""
    again = harness.connect()
    harness.until(lambda: harness.route.connections == 1)
    harness.arrived()
    harness.forwards(again, harness.arrived(), b"hello")
