"""The short way to a client: what a server of ours offers beside ASGI, in the scope's extensions.

An event of a stream that comes by ASGI wakes a task, passes four coroutines and makes a message; by the short way it
is one call from the socket that it came from to the socket that it leaves by. Only the middle of an answer goes so: its
head, its last bytes and whatever has to wait (a client that does not read) go by ASGI, which knows how.

Rejected: a relay that speaks HTTP on bare sockets beside the server (a second parser of requests, which smuggling lives
on); watching for the client's end with a task that waits in `receive` (a task a stream).
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

EXTENSION = "hypercore.direct"


class RawResponse(Protocol):
    """One request's short way. Every member is quick and is called in the event loop that serves the request."""

    @property
    def request_read(self) -> bool:
        """Whether the whole request has arrived and was read, so that nobody need read on."""
        ...

    @property
    def open(self) -> bool:
        """Whether `write` may be called: an answer of unknown length has begun, and the client takes it."""
        ...

    def write(self, data: bytes) -> None:
        """Send a piece of the answer's body, not empty, as a `http.response.body` with `more_body` would."""
        ...

    def on_disconnect(self, call: Callable[[], None] | None) -> None:
        """Have this called, once, when the client has gone (at once if it has); None: have nothing called."""
        ...

    def abort(self) -> None:
        """End the client's connection at once, whatever waits to be written."""
        ...


def raw_response_of(scope: Mapping[str, Any]) -> RawResponse | None:
    """Return the short way to the client of this request, None where its server has none."""
    extensions = scope.get("extensions")
    found: RawResponse | None = None if extensions is None else extensions.get(EXTENSION)
    return found


def abort_connection(scope: Mapping[str, Any]) -> None:
    """End the connection of a client that does not read: closing it would wait, without a limit, until it reads."""
    direct = raw_response_of(scope)
    if direct is not None:
        direct.abort()
