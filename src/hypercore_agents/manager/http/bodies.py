"""Limits of requests' bodies, enforced before a body is read. Bare ASGI, between the front door and the routes.

FastAPI reads and parses a body before it authenticates the sender. These checks run first, in this order:

- authentication, by the headers alone: the body of an unauthenticated request is never read;
- the length of the body: `_LIMITS` by route, `_DEFAULT_LIMIT` for routes with small bodies;
- the memory that bodies use until their requests end, shared fairly among users (`kit/limits/byte_budget.py`). Callers
  that are not users (admins, and all callers without `ENABLE_AUTH`) are distinguished by address, because the body that
  names their user has not been read yet;
- the number of JSON values, counted while the body arrives (`kit/limits/json_bounds.py`).

The bytes of a file are relayed while they arrive, with any Content-Type: they are not held in memory, and are not JSON.
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
"""Maximum number of JSON values in a body. The largest legitimate bodies are the arguments of a tool in an approval."""
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
_DEFAULT_LIMIT = 64 * 1024


class BodyLimits:
    """Enforces the limits. `budget` limits the memory that bodies use."""

    def __init__(self, app: App, authenticator: Authenticator, budget: ByteBudget | None = None) -> None:
        self._app = app
        self._authenticator = authenticator
        self._budget = budget or ByteBudget(BODIES_BYTES, _out_of_memory)

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
    """Return the maximum number of bytes of a body for this path."""
    return next((limit for pattern, limit in _LIMITS if pattern.fullmatch(path)), _DEFAULT_LIMIT)


def holder_of(caller: Caller, scope: Scope) -> str:
    """Return the holder of a body's memory: the user, or the address of a caller that is not a user.

    IPv6 addresses count by their /64 network, the least that one client has.
    """
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


def _out_of_memory() -> HypercoreError:
    return RateLimited(
        "the bodies of running requests use all memory available for them; try again when they have ended",
        retry_after=1,
    )
