"""Tracing with OpenTelemetry: one trace from the client's `traceparent` to the Claude API, sent over OTLP.

If tracing is off (no `OTLP_ENDPOINT`), there is no tracer: OpenTelemetry is not imported, and a request costs one
comparison with None. If it is on, each server creates a span per request, an agent two more per turn (the turn and the
work of its Claude CLI), and the gateway one per model request. A trace that is not sampled costs only its ids.

Spans are queued, up to a limit, and a supervised task sends them in batches as OTLP over HTTP. If the collector does
not answer, only spans are lost. A sandbox cannot reach the collector: an agent sends its spans to the gateway
(`POST /internal/traces`), which forwards them.

Attributes are ids, routes, numbers and error types: no prompt, no answer, no key.

Rejected: automatic instrumentation (it wraps the streaming path, task by task); the SDK's own exporter (a thread with
blocking I/O per process).
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import structlog
from pydantic import StringConstraints

from hypercore_agents.api.errors import Unavailable
from hypercore_agents.kit.relay.upstream import RequestLimits, Upstream

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

_log = structlog.get_logger(__name__)
FLUSH_SECONDS = 1.0
_QUEUE = 4096
_BATCH = 64
_PATIENCE = RequestLimits(connect=2, response=5, idle=5)
OtlpEndpoint = Annotated[str, StringConstraints(pattern=r"^https?://[^/?#@\s]+(/[^?#@\s]*)?$")]
"""Base URL of an OTLP collector, without the path `/v1/traces`."""
MISSING = (
    "OTLP_ENDPOINT is set, but OpenTelemetry is not installed, so tracing is off: pip install hypercore-agents[tracing]"
)

Kind = Literal["server", "client", "internal"]
Post = Callable[[bytes], Awaitable[None]]
"""Sends one batch (`ExportTraceServiceRequest`, protobuf); may raise."""


class Span:
    """An open span. `traceparent` is the header to send with requests under it (W3C Trace Context)."""

    def __init__(self, span: Any) -> None:
        self._span = span
        context = span.get_span_context()
        self.trace_id = f"{context.trace_id:032x}"
        self.traceparent = f"00-{self.trace_id}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    @property
    def sampled(self) -> bool:
        """Whether this trace is recorded."""
        return bool(self._span.is_recording())

    def rename(self, name: str) -> None:
        """Rename the span, once the route of the request is known."""
        self._span.update_name(name)

    def note(self, name: str) -> None:
        """Add an event at the present time."""
        self._span.add_event(name)

    def end(self, *, error: str | None = None, **attributes: str | int | float | bool | None) -> None:
        """End the span; `error` is an error type, never a text."""
        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if error is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, error))
            self._span.set_attribute("error.type", error)
        self._span.end()


class Tracing:
    """Creates and sends the spans of one process. `share` (0 to 1) of the traces that begin here are recorded."""

    def __init__(self, role: str, share: float) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        ended: deque[ReadableSpan] = deque(maxlen=_QUEUE)

        class _Collect(SpanProcessor):
            def on_end(self, span: "ReadableSpan") -> None:
                if span.context is not None and span.context.trace_flags.sampled:
                    ended.append(span)

        self._ended = ended
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(share)),
            resource=Resource.create({"service.name": f"hypercore-{role}"}),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(_Collect())
        self._tracer = provider.get_tracer("hypercore_agents")

    def begin(self, name: str, *, parent: str | None, kind: Kind = "internal", **attributes: str | int) -> Span:
        """Begin a span under the caller's `traceparent`; begin a new trace if it is missing or invalid."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: Mapping[str, str] = {"traceparent": parent} if parent is not None else {}
        context = TraceContextTextMapPropagator().extract(carrier, context=Context())
        kinds = {"server": SpanKind.SERVER, "client": SpanKind.CLIENT, "internal": SpanKind.INTERNAL}
        return Span(self._tracer.start_span(name, context=context, kind=kinds[kind], attributes=attributes))

    async def flush(self, post: Post) -> None:
        """Send the spans that have ended. A batch that cannot be sent is dropped and logged."""
        from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

        while self._ended:
            batch = [self._ended.popleft() for _ in range(min(_BATCH, len(self._ended)))]
            try:
                await post(encode_spans(batch).SerializeToString())
            except asyncio.CancelledError:
                raise
            except Exception as error:
                _log.warning("tracing.not_sent", spans=len(batch), error=type(error).__name__)
                return


def collector(upstream: Upstream, endpoint: str) -> Post:
    """Return a function that sends a batch to the collector at `endpoint` (OTLP over HTTP)."""
    url = f"{endpoint.rstrip('/')}/v1/traces"

    async def post(spans: bytes) -> None:
        headers = [("content-type", "application/x-protobuf")]
        answer = await upstream.open("POST", url, headers=headers, body=spans, limits=_PATIENCE)
        answer.close()
        if answer.status >= 300:
            raise Unavailable(f"the trace collector returned status {answer.status}")

    return post


def open_tracing(role: str, *, on: bool, share: float) -> Tracing | None:
    """Return the tracing of this process; None if it is off or OpenTelemetry is not installed."""
    if not on:
        return None
    try:
        return Tracing(role, share)
    except ImportError:
        _log.warning("tracing.off", reason=MISSING)
        return None
