"""Forwards TCP connections into and out of a VM's isolated network, on exactly two routes.

    outward   HOST:gateway_port in the VM's network  →  the gateway, from the host's network
    inward    the agent's address on the host        →  GUEST:8080, from the VM's network

A connection is a pair of sockets. A socket belongs to the network namespace of the thread that created it, which is the
only link between the two networks. Both targets are fixed before the VM executes its first instruction: no data from
the VM influences where it goes.

Invariants: bytes are passed on as they arrive; a slow reader stops the sender (at most `_CHUNK` bytes wait in each
direction); the end of one direction is passed on as such; a reset ends both directions. Each route has at most
`MAX_CONNECTIONS` connections, and further ones wait in the listener's queue. If descriptors or memory run out, new
connections also wait in the queue: the forwarder pauses accepting for `PAUSE_SECONDS`, instead of retrying in a loop,
and continues to serve existing connections.

Uses the standard library only, because the shim imports it. Rejected: asyncio (ten megabytes more per VM); splice(2)
(a pipe per direction costs two more descriptors); forwarding by the kernel (see `network`).
"""

from __future__ import annotations

import errno
import queue
import select
import socket
import threading
import time
from collections.abc import Callable

MAX_CONNECTIONS = 512
"""Maximum of simultaneous connections of a route."""

PAUSE_SECONDS = 0.2
"""Pause in accepting connections after this process or the host has run out of descriptors or memory."""

_CHUNK = 64 * 1024
_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_CONNECTING = (0, errno.EINPROGRESS)
_RUN_OUT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC})
"""Errors of accept(2), socket(2), epoll_ctl(2): no descriptors left here or on the host, no memory, no watches."""


class SocketMaker:
    """A thread that creates sockets in another network namespace, which `prepare` enters."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        """Start the thread. Raises the exception that `prepare` raises in it."""
        self._wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[socket.socket | BaseException | None] = queue.SimpleQueue()
        self._prepare = prepare
        threading.Thread(target=self._run, daemon=True).start()
        failure = self._made.get()
        if isinstance(failure, BaseException):
            raise failure

    def make(self, family: int) -> socket.socket:
        """Return a new TCP socket of that namespace. Raises OSError."""
        self._wanted.put(family)
        made = self._made.get()
        if isinstance(made, socket.socket):
            return made
        raise made or OSError("no socket was made")

    def _run(self) -> None:
        try:
            self._prepare()
            self._made.put(None)
        except BaseException as error:
            self._made.put(error)
            return
        while True:
            try:
                self._made.put(socket.socket(self._wanted.get(), socket.SOCK_STREAM))
            except OSError as error:
                self._made.put(error)


class Route:
    """A listener, and the target to which its connections are forwarded."""

    def __init__(self, listener: socket.socket, target: tuple[str, int], make: Callable[[int], socket.socket]) -> None:
        self.listener = listener
        self.target = target
        self.make = make
        self.connections = 0
        listener.setblocking(False)


class _Side:
    """One socket of a pair, and the data that waits to be written to it."""

    def __init__(self, sock: socket.socket, route: Route, connected: bool) -> None:
        self.sock = sock
        self.route = route
        self.other: _Side = self
        self.connected = connected
        self.waiting = b""
        self.ended = False
        self.closed_for_writing = False
        self.watched = 0


class Forwarder:
    """Forwards connections. The owner shares `poll` and passes on the events of the forwarder's descriptors."""

    def __init__(self, poll: select.epoll) -> None:
        self._poll = poll
        self._routes: dict[int, Route] = {}
        self._sides: dict[int, _Side] = {}
        self._paused_until: float | None = None

    def open(self, route: Route) -> None:
        """Start accepting connections on a route."""
        self._routes[route.listener.fileno()] = route
        self._poll.register(route.listener, _IN)
        self._listen(route)

    def seconds_until_resume(self) -> float | None:
        """Return the seconds after which the owner must call `resume`, None if it need not."""
        return None if self._paused_until is None else max(0.0, self._paused_until - time.monotonic())

    def resume(self) -> None:
        """Accept connections again if the pause is over."""
        if self._paused_until is not None and time.monotonic() >= self._paused_until:
            self._paused_until = None
            for route in self._routes.values():
                self._listen(route)

    def handle(self, descriptor: int, events: int) -> None:
        """Handle an event; ignore events of descriptors that have been closed."""
        route = self._routes.get(descriptor)
        if route is not None:
            self._accept(route)
            return
        side = self._sides.get(descriptor)
        if side is None:
            return
        try:
            self._move(side, events)
        except OSError:
            self._close(side)

    def _accept(self, route: Route) -> None:
        near = far = None
        try:
            near, _ = route.listener.accept()
            far = route.make(socket.AF_INET6 if ":" in route.target[0] else socket.AF_INET)
            for sock in (near, far):
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if far.connect_ex(route.target) not in _CONNECTING:
                raise OSError("refused")
            one, two = _Side(near, route, True), _Side(far, route, False)
            one.other, two.other = two, one
            self._watch(two)
        except OSError as error:
            for opened in (near, far):
                if opened is not None:
                    opened.close()
            if error.errno in _RUN_OUT:
                self._pause()
            return
        self._sides[near.fileno()], self._sides[far.fileno()] = one, two
        route.connections += 1
        self._listen(route)

    def _pause(self) -> None:
        self._paused_until = time.monotonic() + PAUSE_SECONDS
        for route in self._routes.values():
            self._listen(route)

    def _listen(self, route: Route) -> None:
        """Watch the listener only while connections can be accepted: otherwise it would be reported in a loop."""
        accepting = self._paused_until is None and route.connections < MAX_CONNECTIONS
        self._poll.modify(route.listener, _IN if accepting else 0)

    def _move(self, side: _Side, events: int) -> None:
        if not side.connected:
            number = side.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                raise OSError(number, "not connected")
            side.connected = True
        if events & select.EPOLLERR:
            raise OSError("reset")
        if events & (_IN | select.EPOLLHUP) and not side.ended and not side.other.waiting:
            self._read(side)
        for each in (side, side.other):
            self._flush(each)
        if side.closed_for_writing and side.other.closed_for_writing:
            self._close(side)
            return
        for each in (side, side.other):
            self._watch(each)

    def _read(self, side: _Side) -> None:
        try:
            side.other.waiting = side.sock.recv(_CHUNK)
        except BlockingIOError:
            return
        side.ended = not side.other.waiting

    def _flush(self, side: _Side) -> None:
        """Write waiting data; if none is left and the other side has ended, end this side, too."""
        if not side.connected:
            return
        if side.waiting:
            try:
                side.waiting = side.waiting[side.sock.send(side.waiting) :]
            except BlockingIOError:
                return
        if not side.waiting and side.other.ended and not side.closed_for_writing:
            side.closed_for_writing = True
            side.sock.shutdown(socket.SHUT_WR)

    def _watch(self, side: _Side) -> None:
        wanted = 0
        if side.connected and not side.ended and not side.other.waiting:
            wanted |= _IN
        if side.waiting or not side.connected:
            wanted |= _OUT
        # A socket without wanted events is not watched at all: a hangup is always reported, in a loop.
        if wanted and side.watched:
            self._poll.modify(side.sock, wanted)
        elif wanted:
            self._poll.register(side.sock, wanted)
        elif side.watched:
            self._poll.unregister(side.sock)
        side.watched = wanted

    def _close(self, side: _Side) -> None:
        for each in (side, side.other):
            self._sides.pop(each.sock.fileno(), None)
            each.sock.close()
        side.route.connections -= 1
        self._listen(side.route)
