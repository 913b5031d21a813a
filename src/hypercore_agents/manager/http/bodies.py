"""What is checked of a request with a body before the body is read. Bare ASGI, between the front door and the routes.

FastAPI reads and parses a body before it asks who sent it. So here, in this order:

- who sends it, by the head alone: nobody else's body is read at all;
- how long it may be: `_LIMITS` by route, `_OTHERWISE` for a route that takes next to nothing;
- the memory that bodies take, shared fairly among users (`kit/limits/byte_budget.py`), until the request ends. Callers
  that are no user (admins, everybody without `ENABLE_AUTH`) are told apart by their address: the body that names the
  user for whom they act is not read yet;
- how many JSON values it has, counted as it arrives (`kit/limits/json_bounds.py`).

A file's bytes are passed on as they come, whatever their Content-Type: they are not held here, and are not JSON.
"""

import ipaddress
import re

from fastapi import Request

from hypercore_agents.api.errors import HypercoreError, InvalidRequest, PayloadTooLarge, RateLimited, readable_size
from hypercore_agents.http.context import App, Message, Receive, Scope, Send, header
from hypercore_agents.kit.limits.byte_budget import ByteBudget
from hypercore_agents.kit.limits.json_bounds import JsonBounds
from hypercore_agents.manager.http.auth import Authenticator, Caller

BODIES_BYTES = 256 * 1024 * 1024
VALUES_LIMIT = 50_000
"""JSON values in one body; the largest that anybody needs are a tool's arguments in an approval."""
_MB = 1024 * 1024
_AGENT = r"(?:/agents/[^/]+)?"
_FILE = re.compile(rf"{_AGENT}/v1/agent/session/[^/]+/files/(?s:.+)")
_LIMITS = (
    (re.compile(rf"{_AGENT}/v1/agent/chat"), 16 * _MB),
    (_FILE, 16 * _MB),
    (re.compile(rf"{_AGENT}/v1/agent/session/[^/]+/approvals/.+"), 8 * _MB),
    (re.compile(r"/v1/agents/spawn"), 16 * _MB),
    (re.compile(r"/v1/pool(?:/.*)?"), 4 * _MB),
)
_OTHERWISE = 64 * 1024


class BodyDoor:
    """Lets bodies through to the routes. `budget` bounds what they take in memory."""

    def __init__(self, app: App, authenticator: Authenticator, budget: ByteBudget | None = None) -> None:
        self._app = app
        self._authenticator = authenticator
        self._budget = budget or ByteBudget(BODIES_BYTES, _no_room)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope. Raises domain errors for the middleware around it."""
        if scope["type"] != "http" or (length := scope["state"]["body_length"]) == 0:
            await self._app(scope, receive, send)
            return
        caller = scope["state"]["caller"] = await self._authenticator(Request(scope))
        limit = limit_of(scope["path"])
        if length is not None and length > limit:
            raise _too_large(limit)
        if (coding := header(scope, "content-encoding")) not in (None, "identity"):
            raise InvalidRequest(f"send the body without a Content-Encoding ({coding[:64]})", field="Content-Encoding")
        if scope["method"] == "PUT" and _FILE.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        with self._budget.hold(holder_of(caller, scope)) as hold:
            if length is not None:
                await hold.take(length)
            bounds, received = JsonBounds(VALUES_LIMIT), 0

            async def bounded() -> Message:
                nonlocal received
                message = await receive()
                if piece := message.get("body"):
                    received += len(piece)
                    if length is None:
                        if received > limit:
                            raise _too_large(limit)
                        hold.grow(len(piece))
                    bounds.feed(piece)
                return message

            await self._app(scope, bounded, send)


def limit_of(path: str) -> int:
    """Return how many bytes a body for this path may have."""
    return next((limit for pattern, limit in _LIMITS if pattern.fullmatch(path)), _OTHERWISE)


def holder_of(caller: Caller, scope: Scope) -> str:
    """Return who holds a body in memory: the user, or the address of a caller that is no user. An IPv6 address counts
    by its /64 network, which is what one client has at least."""
    if caller.user_id is not None:
        return f"user {caller.user_id}"
    client = scope.get("client")
    if client is None:
        return caller.scope
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0])
    except ValueError:
        return f"{caller.scope} at {client[0]}"
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or ipaddress.IPv6Network((address, 64), strict=False).network_address
    return f"{caller.scope} at {address}"


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {readable_size(limit)}", details={"limit_bytes": limit})


def _no_room() -> HypercoreError:
    return RateLimited(
        "bodies of running requests take all the memory that there is for them; try again when they have ended",
        retry_after=1,
    )
