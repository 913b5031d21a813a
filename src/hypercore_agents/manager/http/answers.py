"""Answers that routes hand to the relay: FastAPI finds the route and checks the body, the bytes pass beside it."""

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
        description="1 to 255 printable ASCII characters; the same request sent again with it is done once",
    ),
]


def replayed(stored: Stored) -> Response:
    """Answer as the first request was answered."""
    headers = {"content-type": stored.content_type, "idempotent-replayed": "true"}
    return Response(stored.body, status_code=stored.status, headers=headers)


class RelayedAnswer(Response):
    """An answer that somebody else writes on bare ASGI. Errors raised before it is begun come out as any route's."""

    def __init__(self, write: Callable[[Scope, Receive, Send], Awaitable[object]]) -> None:
        super().__init__()
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the answer."""
        await self._write(scope, receive, send)
