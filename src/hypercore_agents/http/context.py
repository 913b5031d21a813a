"""Request ids, access logs and body limits: one ASGI middleware around every server of the platform.

It is bare ASGI because it is on the streaming path: Starlette's BaseHTTPMiddleware adds a task and a queue to every
chunk.
"""

import math
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import structlog

from hypercore_agents.api.errors import HypercoreError, InternalError, PayloadTooLarge
from hypercore_agents.api.ids import is_request_id, new_request_id
from hypercore_agents.api.internal import REQUEST_ID_HEADER
from hypercore_agents.kit.relay.headers import framing
from hypercore_agents.observability.metrics import status_class
from hypercore_agents.observability.tracing import Span, Tracing

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = structlog.get_logger("hypercore_agents.access")
_QUIET = {"/health", "/ready", "/metrics"}
INTERNAL_ERROR_MESSAGE = "internal error; search the server log for this request_id"


def request_id_of(scope: Scope) -> str:
    """Return the id of this scope's request."""
    return str(scope.get("state", {}).get("request_id", "req_unknown"))


def span_of(scope: Scope) -> Span | None:
    """Return the span of this scope's request; None if tracing is off."""
    span: Span | None = scope.get("state", {}).get("span")
    return span


def note_ids(scope: Scope, **ids: str | int | None) -> None:
    """Add ids, such as the session's, to the request's log line and span."""
    scope["state"].setdefault("log", {}).update(ids)


def header(scope: Scope, name: str) -> str | None:
    """Return the first value of a header (lower-case name), decoded as Latin-1 (RFC 9110 §5.5), or None."""
    wanted = name.encode()
    for key, value in scope["headers"]:
        if key == wanted:
            return bytes(value).decode("latin-1")
    return None


async def send_error(send: Send, error: HypercoreError, request_id: str) -> None:
    """Send a domain error as the response, on bare ASGI."""
    body = error.body(request_id).model_dump_json(exclude_none=True).encode()
    headers: list[tuple[bytes, bytes]] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after))).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class RequestContext:
    """Gives each request an id, bounds its body, and logs one line when it ends.

    `max_body` is in bytes; a longer body is refused with 413, with or without Content-Length.
    `on_end(scope, status, seconds)` is called once per request, for metrics. With `tracing`, each request is a span.
    """

    def __init__(
        self,
        app: App,
        *,
        max_body: int = 16 * 1024 * 1024,
        trusted_request_id: bool = True,
        on_end: Callable[[Scope, int, float], None] | None = None,
        quiet: Iterable[str] = _QUIET,
        tracing: Tracing | None = None,
    ) -> None:
        self._app = app
        self._max_body = max_body
        self._trusted = trusted_request_id
        self._on_end = on_end
        self._quiet = frozenset(quiet)
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = header(scope, REQUEST_ID_HEADER)
        request_id = given if self._trusted and given and is_request_id(given) else new_request_id()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        structlog.contextvars.bind_contextvars(request_id=request_id)
        if self._tracing is not None and scope["path"] not in self._quiet:
            self._begin_span(self._tracing, scope)
        started = time.perf_counter()
        first_byte: float | None = None
        status = 0

        def send_with_id(message: Message) -> Awaitable[None]:
            nonlocal status, first_byte
            if message["type"] == "http.response.start":
                status = int(message["status"])
                first_byte = time.perf_counter() - started
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            return send(message)

        try:
            length = state["body_length"] = framing(scope["headers"])
            if length is None:
                receive = self._bounded(receive)
            elif length > self._max_body:
                raise self._too_large()
            await self._app(scope, receive, send_with_id)
        except HypercoreError as error:
            if status:
                raise
            state["error_type"] = error.type
            await send_error(send_with_id, error, request_id)
        except Exception as error:
            if status:
                raise
            _log.error("request.defect", request_id=request_id, path=scope["path"], exc_info=error)
            state["error_type"] = InternalError.type
            await send_error(send_with_id, InternalError(INTERNAL_ERROR_MESSAGE), request_id)
        finally:
            seconds = time.perf_counter() - started
            if self._on_end is not None:
                self._on_end(scope, status, seconds)
            if scope["path"] not in self._quiet:
                _finish(scope, status, seconds, first_byte)

    def _bounded(self, receive: Receive) -> Receive:
        """Bound a body without Content-Length; the parser enforces a stated length."""
        received = 0

        async def bounded_receive() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_body:
                    raise self._too_large()
            return message

        return bounded_receive

    def _begin_span(self, tracing: Tracing, scope: Scope) -> None:
        span = tracing.begin(
            str(scope["method"]), parent=header(scope, "traceparent"), kind="server", **{"url.path": str(scope["path"])}
        )
        scope["state"]["span"] = span
        structlog.contextvars.bind_contextvars(trace_id=span.trace_id)

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"the body is larger than {self._max_body} bytes", details={"limit_bytes": self._max_body}
        )


def _finish(scope: Scope, status: int, seconds: float, first_byte: float | None) -> None:
    """Log a request and end its span. `outcome` differs from the status if an event stream failed after its start."""
    state = scope["state"]
    final, error_type, ids = state.get("outcome", status), state.get("error_type"), state.get("log", {})
    outcome = "disconnected" if not final else error_type or status_class(final)
    _log.info(
        "request",
        method=scope["method"],
        path=scope["path"],
        status=status or None,
        outcome=outcome,
        duration_ms=round(seconds * 1000, 1),
        first_byte_ms=None if first_byte is None else round(first_byte * 1000, 1),
        **ids,
    )
    if (span := span_of(scope)) is not None:
        route = getattr(scope.get("route"), "path", None)
        if route is not None:
            span.rename(f"{scope['method']} {route}")
        span.end(
            error=None if outcome in ("ok", "client_error", "disconnected") else outcome,
            **{"http.response.status_code": status, "request_id": state["request_id"], "outcome": outcome},
            **ids,
        )
