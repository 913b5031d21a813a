"""Reads the bodies of model requests within limits on bytes, on JSON values and on the memory of all bodies together.

A session's tools can send anything to the gateway, and rejected requests cost them nothing. So before a body is parsed:

- its bytes count against a budget that sessions and users share fairly (`kit/limits/byte_budget.py`), from the first
  byte until the Claude API begins to answer, when the body is no longer needed;
- its JSON values are counted as it arrives (`kit/limits/json_bounds.py`);
- a large body is parsed, checked and encoded off the event loop, one at a time (`kit/aio/thread_lane.py`).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hypercore_agents.api.errors import HypercoreError, InvalidRequest, PayloadTooLarge, RateLimited, readable_size
from hypercore_agents.http.context import Receive, Scope, header
from hypercore_agents.kit.aio.thread_lane import ThreadLane
from hypercore_agents.kit.limits.byte_budget import ByteBudget, HeldBytes
from hypercore_agents.kit.limits.json_bounds import JsonBounds
from hypercore_agents.kit.relay.headers import body_length

T = TypeVar("T")
BODY_LIMIT = 32 * 1024 * 1024
VALUES_LIMIT = 200_000
"""JSON values in one request. The API accepts at most 100,000 messages; a long session of the CLI has about 20,000."""
_BODY_SECONDS = 60.0
_LARGE_BYTES = 256 * 1024
_LARGE_VALUES = 10_000


@dataclass(frozen=True)
class Body:
    """A body as received. `large`: processing it would block the event loop noticeably."""

    raw: bytes
    large: bool


class Bodies:
    """Reads the bodies of one gateway. `total` is the memory of all bodies in bytes. Close it at the end."""

    def __init__(self, total: int) -> None:
        self.budget = ByteBudget(total, _memory_exhausted)
        self._lane = ThreadLane("gateway-bodies")

    async def read(self, scope: Scope, receive: Receive, hold: HeldBytes) -> Body:
        """Return the body. Raises InvalidRequest, PayloadTooLarge or RateLimited (no memory left for bodies)."""
        length = body_length(scope["headers"])
        if scope["method"] == "GET":
            if length != 0:
                raise InvalidRequest("a GET request must not have a body", field="body")
            return Body(b"", large=False)
        if (coding := header(scope, "content-encoding")) not in (None, "identity"):
            raise InvalidRequest(f"send the body without a Content-Encoding ({coding[:64]})", field="Content-Encoding")
        if length is not None:
            if length > BODY_LIMIT:
                raise _too_large()
            await hold.take(length)
        bounds, pieces, size = JsonBounds(VALUES_LIMIT), list[bytes](), 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise InvalidRequest("the client disconnected before the end of its request")
                    if piece := message.get("body", b""):
                        size += len(piece)
                        if size > BODY_LIMIT:
                            raise _too_large()
                        if length is None:
                            hold.grow(len(piece))
                        bounds.feed(piece)
                        pieces.append(piece)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise InvalidRequest(f"the body did not arrive within {_BODY_SECONDS:g} s") from None
        return Body(b"".join(pieces), large=size > _LARGE_BYTES or bounds.upper_bound > _LARGE_VALUES)

    async def work(self, body: Body, holder: str, work: Callable[[], T]) -> T:
        """Run work whose time grows with the body: directly, or off the event loop if the body is large."""
        return await self._lane.run(holder, work) if body.large else work()

    def close(self) -> None:
        """Accept no more work."""
        self._lane.close()


def _too_large() -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {readable_size(BODY_LIMIT)}", details={"limit_bytes": BODY_LIMIT})


def _memory_exhausted() -> HypercoreError:
    return RateLimited(
        "the bodies of running model requests use all of the gateway's memory for bodies (MODEL_BODIES_MB); "
        "wait for one of them",
        retry_after=1,
    )
