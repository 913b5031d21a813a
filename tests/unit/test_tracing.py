"""Tracing costs nothing when disabled, follows the caller's sampling decision, and never stops a server."""

import subprocess
import sys

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from hypercore_agents.api.errors import Unavailable
from hypercore_agents.observability import tracing
from hypercore_agents.observability.tracing import Tracing, open_tracing

SAMPLED = f"00-{'a' * 32}-{'b' * 16}-01"
UNSAMPLED = f"00-{'a' * 32}-{'b' * 16}-00"


async def sent(traced: Tracing) -> list[str]:
    names: list[str] = []

    async def post(body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names.extend(span.name for scope in resource.scope_spans for span in scope.spans)

    await traced.flush(post)
    return names


@pytest.mark.parametrize("module", ["manager.app", "gateway.app", "agent.server.app"])
def test_disabled_tracing_does_not_import_opentelemetry(module: str) -> None:
    # other libraries import its API if it is installed; only the platform imports its SDK and exporters
    program = (
        f"import sys; import hypercore_agents.{module};"
        "from hypercore_agents.observability.tracing import open_tracing;"
        "assert open_tracing('manager', on=False, share=1) is None;"
        "ours = ('opentelemetry.sdk', 'opentelemetry.exporter', 'opentelemetry.proto');"
        "print([name for name in sys.modules if name.startswith(ours)])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == "[]"


async def test_sampling_follows_the_caller_or_the_configured_share() -> None:
    traced = Tracing("test", share=0)
    for parent, name in ((SAMPLED, "sampled"), (UNSAMPLED, "unsampled"), (None, "own"), ("nonsense", "garbled")):
        traced.begin(name, parent=parent).end()
    assert await sent(traced) == ["sampled"]
    always = Tracing("test", share=1)
    for parent, name in ((UNSAMPLED, "unsampled"), (None, "own"), ("nonsense", "garbled")):
        always.begin(name, parent=parent).end()
    assert await sent(always) == ["own", "garbled"]


def test_spans_continue_the_callers_trace() -> None:
    span = Tracing("test", share=0).begin("x", parent=SAMPLED)
    version, trace, own, flags = span.traceparent.split("-")
    assert (version, trace, flags) == ("00", "a" * 32, "01")
    assert own != "b" * 16
    assert span.trace_id == trace


async def test_an_unreachable_collector_only_loses_spans() -> None:
    traced = Tracing("test", share=1)
    traced.begin("lost", parent=None).end()

    async def refuse(_: bytes) -> None:
        raise Unavailable("no")

    await traced.flush(refuse)
    traced.begin("kept", parent=None).end()
    assert await sent(traced) == ["kept"]


async def test_batches_fit_into_the_gateways_limit() -> None:
    traced = Tracing("test", share=1)
    for number in range(500):
        traced.begin("claude_cli", parent=None, session_id="s" * 36, number=number).end(
            error="internal", text="x" * 200
        )
    sizes: list[int] = []

    async def post(body: bytes) -> None:
        sizes.append(len(body))

    await traced.flush(post)
    assert len(sizes) > 1
    assert max(sizes) < 64 * 1024


def test_tracing_stays_off_without_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise ImportError("opentelemetry")

    monkeypatch.setattr(tracing, "Tracing", missing)
    assert open_tracing("manager", on=True, share=1) is None
