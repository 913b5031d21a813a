"""The two ways on and off a VM's island, and no third: TCP connections, carried byte by byte.

    outward   HOST:gateway_port on the island  →  the gateway, from the host's network
    inward    the agent's address on the host  →  GUEST:8080, from the island

A connection is one pair of sockets; a socket belongs to the network namespace of the thread that made it, which is all
that joins the two networks. Both targets are fixed before the VM runs its first instruction: nothing that the VM sends
chooses where it goes.

What it keeps true: bytes are passed on as they arrive; whoever reads slowly stops the other side (at most `_CHUNK`
bytes wait per direction); an end of one direction is passed on as one; a reset ends both sides. One side may have at
most `MOST_CONNECTIONS` connections, more wait in the listener's queue. Where descriptors or memory have run out,
whoever comes waits in the queue too: the forwarder rests for `REST_SECONDS`, instead of asking again and again, and
goes on carrying what it has.

Standard library only: the shim imports it. Rejected: asyncio (ten megabytes more per VM); splice(2) (Python has it, but
a pipe per direction costs two descriptors more); kernel forwarding (see `network`).
"""

from __future__ import annotations

import errno
import queue
import select
import socket
import threading
import time
from collections.abc import Callable

MOST_CONNECTIONS = 512
"""Connections that one direction may have at a time."""

REST_SECONDS = 0.2
"""How long no connection is taken once this process or the host has run out of what one needs."""

_CHUNK = 64 * 1024
_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_CONNECTING = (0, errno.EINPROGRESS)
_RUN_OUT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC})
"""accept(2), socket(2), epoll_ctl(2): too few descriptors here or on the host, too little memory, too many watched."""


class SocketMaker:
    """A thread that stays in the network namespace in which `prepare` leaves it, and makes sockets there."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        """Start the thread. Raises what `prepare` raises in it."""
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


class Way:
    """One direction in which connections are opened: where they come in and where they go."""

    def __init__(self, listener: socket.socket, target: tuple[str, int], make: Callable[[int], socket.socket]) -> None:
        self.listener = listener
        self.target = target
        self.make = make
        self.connections = 0
        listener.setblocking(False)


class _Half:
    """One socket of a pair, and what waits to be written to it."""

    def __init__(self, sock: socket.socket, way: Way, connected: bool) -> None:
        self.sock = sock
        self.way = way
        self.other: _Half = self
        self.connected = connected
        self.waiting = b""
        self.ended = False
        self.closed_for_writing = False
        self.watched = 0


class Forwarder:
    """Carries connections. `poll` is shared with the owner, which hands over the events of our descriptors."""

    def __init__(self, poll: select.epoll) -> None:
        self._poll = poll
        self._ways: dict[int, Way] = {}
        self._halves: dict[int, _Half] = {}
        self._rests_until: float | None = None

    def open(self, way: Way) -> None:
        """Begin to take connections."""
        self._ways[way.listener.fileno()] = way
        self._poll.register(way.listener, _IN)
        self._listen(way)

    def patience(self) -> float | None:
        """Return the seconds after which the owner must call `go_on`, None while there is no need to."""
        return None if self._rests_until is None else max(0.0, self._rests_until - time.monotonic())

    def go_on(self) -> None:
        """Take connections again if it has rested long enough."""
        if self._rests_until is not None and time.monotonic() >= self._rests_until:
            self._rests_until = None
            for way in self._ways.values():
                self._listen(way)

    def handle(self, descriptor: int, events: int) -> None:
        """Work on an event; events of descriptors that are not ours any more are nothing."""
        way = self._ways.get(descriptor)
        if way is not None:
            self._accept(way)
            return
        half = self._halves.get(descriptor)
        if half is None:
            return
        try:
            self._move(half, events)
        except OSError:
            self._close(half)

    def _accept(self, way: Way) -> None:
        near = far = None
        try:
            near, _ = way.listener.accept()
            far = way.make(socket.AF_INET6 if ":" in way.target[0] else socket.AF_INET)
            for sock in (near, far):
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if far.connect_ex(way.target) not in _CONNECTING:
                raise OSError("refused")
            one, two = _Half(near, way, True), _Half(far, way, False)
            one.other, two.other = two, one
            self._watch(two)
        except OSError as error:
            for opened in (near, far):
                if opened is not None:
                    opened.close()
            if error.errno in _RUN_OUT:
                self._rest()
            return
        self._halves[near.fileno()], self._halves[far.fileno()] = one, two
        way.connections += 1
        self._listen(way)

    def _rest(self) -> None:
        self._rests_until = time.monotonic() + REST_SECONDS
        for way in self._ways.values():
            self._listen(way)

    def _listen(self, way: Way) -> None:
        """Watch the listener, or not while no connection can be taken: it would be reported again and again."""
        takes = self._rests_until is None and way.connections < MOST_CONNECTIONS
        self._poll.modify(way.listener, _IN if takes else 0)

    def _move(self, half: _Half, events: int) -> None:
        if not half.connected:
            number = half.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                raise OSError(number, "not connected")
            half.connected = True
        if events & select.EPOLLERR:
            raise OSError("reset")
        if events & (_IN | select.EPOLLHUP) and not half.ended and not half.other.waiting:
            self._read(half)
        for side in (half, half.other):
            self._flush(side)
        if half.closed_for_writing and half.other.closed_for_writing:
            self._close(half)
            return
        for side in (half, half.other):
            self._watch(side)

    def _read(self, half: _Half) -> None:
        try:
            half.other.waiting = half.sock.recv(_CHUNK)
        except BlockingIOError:
            return
        half.ended = not half.other.waiting

    def _flush(self, half: _Half) -> None:
        """Write what waits; when nothing is left and the other side has ended, end here too."""
        if not half.connected:
            return
        if half.waiting:
            try:
                half.waiting = half.waiting[half.sock.send(half.waiting) :]
            except BlockingIOError:
                return
        if not half.waiting and half.other.ended and not half.closed_for_writing:
            half.closed_for_writing = True
            half.sock.shutdown(socket.SHUT_WR)

    def _watch(self, half: _Half) -> None:
        wanted = 0
        if half.connected and not half.ended and not half.other.waiting:
            wanted |= _IN
        if half.waiting or not half.connected:
            wanted |= _OUT
        # Not watched at all where nothing is wanted: a hangup is reported always, and would be again and again.
        if wanted and half.watched:
            self._poll.modify(half.sock, wanted)
        elif wanted:
            self._poll.register(half.sock, wanted)
        elif half.watched:
            self._poll.unregister(half.sock)
        half.watched = wanted

    def _close(self, half: _Half) -> None:
        for side in (half, half.other):
            self._halves.pop(side.sock.fileno(), None)
            side.sock.close()
        half.way.connections -= 1
        self._listen(half.way)
