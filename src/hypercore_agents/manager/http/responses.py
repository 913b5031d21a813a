"""Responses that a route writes to the ASGI connection itself, and the `Idempotency-Key` header.

FastAPI matches the route and validates the request; the response's bytes do not pass through it.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Header, Response

from hypercore_agents.http.context import Receive, Scope, Send
from hypercore_agents.manager.idempotency import KEY_PATTERN, Stored

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=KEY_PATTERN,
        description="1 to 255 printable ASCII characters; a request repeated with the same key is carried out once",
    ),
]


def replayed(stored: Stored) -> Response:
    """Return the stored response of the first request with this key."""
    headers = {"content-type": stored.content_type, "idempotent-replayed": "true"}
    return Response(stored.body, status_code=stored.status, headers=headers)


class RelayedResponse(Response):
    """A response that `write` sends on bare ASGI. Errors raised before it starts are handled as any route's errors."""

    def __init__(self, write: Callable[[Scope, Receive, Send], Awaitable[object]]) -> None:
        super().__init__()
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the response."""
        await self._write(scope, receive, send)
