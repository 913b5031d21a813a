"""The forwarder beside a VM, when descriptors run out under a flood of connections. Real sockets, real limits."""

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
from hypercore_agents.compute.microvm.forwarding import Forwarder, Way

LOOPBACK = ("127.0.0.1", 0)


class Carrier:
    """A forwarder with one way and the loop of its owner, which counts how often it is woken."""

    def __init__(self) -> None:
        self.target = socket.create_server(LOOPBACK, backlog=256)
        listener = socket.create_server(LOOPBACK, backlog=256)
        self.address = listener.getsockname()
        self.poll = select.epoll()
        self.forwarder = Forwarder(self.poll)
        self.way = Way(listener, self.target.getsockname(), lambda family: socket.socket(family, socket.SOCK_STREAM))
        self.forwarder.open(self.way)
        self.opened: list[socket.socket] = []

    def turn(self, longest: float = 0.0) -> int:
        """Go round once; return how many events there were."""
        patience = self.forwarder.patience()
        events = self.poll.poll(longest if patience is None else min(longest, patience))
        for descriptor, what in events:
            self.forwarder.handle(descriptor, what)
        self.forwarder.go_on()
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

    def carries(self, client: socket.socket, far: socket.socket, word: bytes) -> None:
        """Say something through the forwarder and hear it at the other end."""
        client.sendall(word)
        far.setblocking(False)
        heard = b""

        def said() -> bool:
            nonlocal heard
            with contextlib.suppress(BlockingIOError):
                heard += far.recv(64)
            return heard == word

        self.until(said)

    def arrived(self) -> socket.socket:
        """Return the next connection at the target."""
        found, _ = self.target.accept()
        self.opened.append(found)
        return found

    def close(self) -> None:
        for client in self.opened:
            client.close()
        self.until(lambda: self.way.connections == 0)
        self.way.listener.close()
        self.target.close()
        self.poll.close()


@pytest.fixture
def carrier() -> Iterator[Carrier]:
    carrier = Carrier()
    yield carrier
    carrier.close()


@contextlib.contextmanager
def only(descriptors: int) -> Iterator[None]:
    """Let this process open so many more descriptors and no more."""
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
def test_without_descriptors_the_forwarder_rests_and_carries_what_it_has(carrier: Carrier, left: int) -> None:
    """With seven left the fourth connection can be accepted but has no socket to go on; with six not even that."""
    clients = [carrier.connect() for _ in range(12)]
    with only(left):
        turns = 0
        while carrier.turn():
            turns += 1
            assert turns < 100  # it would be woken by the waiting connections for ever
        assert carrier.way.connections == 3
        patience = carrier.forwarder.patience()
        assert patience is not None
        assert 0 <= patience <= forwarding.REST_SECONDS
    first = carrier.arrived()
    carrier.carries(clients[0], first, b"still here")
    # Descriptors are there again: all that still wait are taken, nobody had to come twice.
    waiting = 12 - 3 - (1 if left == 7 else 0)
    carrier.until(lambda: carrier.way.connections == 3 + waiting)
    assert carrier.forwarder.patience() is None
    for _ in range(2 + waiting):
        last = carrier.arrived()
    carrier.carries(clients[-1], last, b"after all")


def test_more_connections_than_a_way_may_have_wait_and_are_served_later(
    carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarding, "MOST_CONNECTIONS", 2)
    clients = [carrier.connect() for _ in range(4)]
    turns = 0
    while carrier.turn():
        turns += 1
        assert turns < 100
    assert carrier.way.connections == 2
    clients[0].close()
    carrier.arrived().close()
    carrier.until(lambda: carrier.way.connections == 2 and not carrier.turn())
    carrier.arrived()
    carrier.carries(clients[2], carrier.arrived(), b"my turn")


def test_a_connection_that_cannot_be_watched_is_closed_and_the_forwarder_lives(
    carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """epoll_ctl(2) says ENOSPC at the limit of watched descriptors, which the whole host shares."""

    def full(self: Forwarder, half: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Forwarder, "_watch", full)
        client = carrier.connect()
        while carrier.turn():
            pass
        assert carrier.way.connections == 0
        assert carrier.forwarder.patience() is not None
    client.setblocking(True)
    client.settimeout(10)
    assert client.recv(1) == b""
    again = carrier.connect()
    carrier.until(lambda: carrier.way.connections == 1)
    carrier.arrived()
    carrier.carries(again, carrier.arrived(), b"hello")
