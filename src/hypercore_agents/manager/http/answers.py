"""Answers that routes hand to the relay: FastAPI finds the route and checks the body, the bytes pass beside it."""

from collections.abc import Awaitable, Callable

from fastapi import Response

from hypercore_agents.http.context import Receive, Scope, Send


class RelayedAnswer(Response):
    """An answer that somebody else writes on bare ASGI. Errors raised before it is begun come out as any route's."""

    def __init__(self, write: Callable[[Scope, Receive, Send], Awaitable[object]]) -> None:
        super().__init__()
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the answer."""
        await self._write(scope, receive, send)
