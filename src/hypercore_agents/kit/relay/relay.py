"""The streaming HTTP relay of all three hops: front door to agent (by host and by path), gateway to the Claude API.

Invariants:

- Bytes are passed on as they arrive, one `send` per read. While the client does not read, the upstream's socket is not
  read either (back-pressure).
- When the client disconnects, the upstream request is cancelled at once (`on_disconnect="cancel"`), or the response is
  read completely so that the observer sees all of it (`"drain"`). `"drain_begun"` drains only if bytes of the body have
  been passed on already.
- A `text/event-stream` that fails after its start ends with an error event. Only whole frames are passed on before, so
  the event cannot become part of another frame. Any other response that fails is cut off, and its framing shows the
  client that it is incomplete.
- `Observer.before_last` returns before the last bytes of a response are passed on.

Work per chunk is O(1) except for copying split frames; the relay parses nothing.

Rejected: Starlette's StreamingResponse (a task group and an iterator per stream, and it cannot detect a disconnect
while it waits for the upstream's first byte); buffering one chunk to identify the last one (delays each event by one).
"""

import asyncio
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from hypercore_agents.api.errors import DeadlineExceeded, HypercoreError, Unavailable
from hypercore_agents.api.internal import REQUEST_ID_HEADER
from hypercore_agents.kit.relay.delayed_calls import DelayedCall
from hypercore_agents.kit.relay.headers import body_length, forwardable_request_headers
from hypercore_agents.kit.relay.observer import Observer, RelayOutcome
from hypercore_agents.kit.relay.raw_response import raw_response_of
from hypercore_agents.kit.relay.relay_client import Message, OnDisconnect, Receive, RelayClient
from hypercore_agents.kit.relay.relay_control import RelayControl
from hypercore_agents.kit.relay.relayed_response import RelayedResponse, Send
from hypercore_agents.kit.relay.time_limit import TimeLimit
from hypercore_agents.kit.relay.upstream import Peer, RequestLimits, Upstream, UpstreamResponse

__all__ = ["Message", "Observer", "Peer", "Relay", "RelayOutcome", "RequestLimits", "UpstreamResponse"]

Scope = MutableMapping[str, Any]

_REQUEST_ID = REQUEST_ID_HEADER.encode()
_NO_STATE: Mapping[str, Any] = {}


class Relay(Upstream):
    """Relays ASGI requests to an upstream over pooled connections. Create one per kind of upstream, and close it."""

    def __init__(
        self,
        *,
        peer: Peer | None = None,
        limits: RequestLimits | None = None,
        connections: int = 8192,
        keep_alive: float = 30.0,
    ) -> None:
        super().__init__(
            peer=peer or Peer(), limits=limits or RequestLimits(), connections=connections, keep_alive=keep_alive
        )

    async def relay(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        url: str,
        method: str | None = None,
        headers: Iterable[tuple[str, str]] = (),
        drop: Sequence[str] = (),
        pass_headers: bool = True,
        body: bytes | None = None,
        limits: RequestLimits | None = None,
        observer: Observer | None = None,
        on_disconnect: OnDisconnect = "cancel",
        drain_seconds: float | None = None,
        keep_cookies: bool = False,
        control: RelayControl | None = None,
    ) -> RelayOutcome:
        """Send the request of this scope to `url` and pass the response on.

        `headers` replace client headers of the same name; `drop` names client headers that are not passed on; with
        `pass_headers=False` none are. Without `body`, the request's body is streamed; with it, `receive` must have been
        read to the end. `drain_seconds` bounds reading after the client has disconnected. A `control` can add frames to
        the response or end it.

        Raises a domain error if no response has begun. A later failure is reported in the stream (or by cutting the
        response off) and in the outcome.
        """
        limits = limits or self._limits
        state = scope.get("state", _NO_STATE)
        length = state["body_length"] if "body_length" in state else body_length(scope["headers"])
        sent_headers = [(name.lower().encode(), value.encode()) for name, value in headers]
        if pass_headers:
            dropped = [name for name, _ in sent_headers]
            if drop:
                dropped += [name.lower().encode() for name in drop]
            if (request_id := state.get("request_id")) is not None:
                sent_headers.append((_REQUEST_ID, request_id.encode()))
            sent_headers += forwardable_request_headers(scope["headers"], drop=dropped)
        raw = raw_response_of(scope)
        time_limit = TimeLimit(self.loop)
        response = RelayedResponse(send, observer or Observer(), keep_cookies, raw)
        client = response.client = RelayClient(
            receive,
            raw,
            time_limit,
            response.outcome,
            on_disconnect,
            drain_seconds,
            limits,
            body_read=body is not None or length == 0,
        )
        source = body if body is not None else client.body() if length != 0 else None
        if length is not None and length > limits.request_bytes:
            raise client.too_large()
        enforcement: DelayedCall | None = None
        if control is not None:
            control.attach(response, time_limit)
        try:
            with time_limit:
                enforcement = self.delayed_calls.call(client.enforce_limits)
                response.upstream = await self.open(
                    method or scope["method"], url, raw_headers=sent_headers, body=source, length=length, limits=limits
                )
                body = source = None  # free the memory: the request is sent, and the response may stream for an hour
                await response.relay()
        except TimeoutError:
            if not client.gone:
                ended = control.error if control is not None else None
                await response.fail(
                    ended or DeadlineExceeded(f"the request took longer than the allowed {limits.total} s")
                )
        except HypercoreError as error:
            if not client.gone:
                await response.fail(error)
            else:
                response.outcome.error = error
        except asyncio.CancelledError:
            # The server is stopping and the request's grace period is over. Reporting that to the client is fast.
            if client.gone:
                raise
            await response.fail(ShuttingDown())
        finally:
            if control is not None:
                control.detach()
            if enforcement is not None:
                enforcement.cancel()
            client.unwatch()
            if response.upstream is not None:
                response.upstream.close()
        response.outcome.client_gone = client.gone
        return response.outcome


class ShuttingDown(Unavailable):
    """The server stopped before the request ended. The request may have had effects, so it is not retryable."""

    retryable = False

    def __init__(self) -> None:
        super().__init__("the server shut down before the request ended; check what it did before you send it again")
