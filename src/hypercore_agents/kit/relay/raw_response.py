"""Direct writing to a client's socket: an extension to ASGI that our servers offer in the request's scope.

Sending an event of a stream by ASGI wakes a task, passes through four coroutines and creates a message. `RawResponse`
takes one call from the socket of the upstream to the socket of the client. It is used only in the middle of a response.
The head, the last bytes, and bytes that must wait for a slow client are sent by ASGI.

Rejected: a relay on bare sockets beside the server (a second parser of requests, which makes request smuggling
possible); a task that waits in `receive` for the client's disconnect (one task per stream).
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

EXTENSION = "hypercore.raw_response"


class RawResponse(Protocol):
    """Direct access to the client of one request. Call its members in the event loop that serves the request."""

    @property
    def request_read(self) -> bool:
        """Whether the whole request has been received and read."""
        ...

    @property
    def writable(self) -> bool:
        """Whether `write` may be called: a response of unknown length has begun, and its client reads."""
        ...

    def write(self, data: bytes) -> None:
        """Send a non-empty piece of the body, as `http.response.body` with `more_body` does."""
        ...

    def on_disconnect(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` once, when the client has disconnected (at once if it has); None removes the callback."""
        ...

    def abort(self) -> None:
        """Close the client's connection at once; pending bytes are dropped."""
        ...


def raw_response_of(scope: Mapping[str, Any]) -> RawResponse | None:
    """Return direct access to the client of this request, None if its server does not offer it."""
    extensions = scope.get("extensions")
    found: RawResponse | None = None if extensions is None else extensions.get(EXTENSION)
    return found


def abort_connection(scope: Mapping[str, Any]) -> None:
    """Abort the connection of a client that does not read: a regular close would wait for it without a limit."""
    raw = raw_response_of(scope)
    if raw is not None:
        raw.abort()
