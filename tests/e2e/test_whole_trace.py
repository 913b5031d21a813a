"""One trace through the whole platform, collected over OTLP: client, manager, agent, CLI, gateway, API; and its logs.

The real `up --demo` with the real Claude CLI. The prompt contains a canary that must not appear in any span or log.
"""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from support.folders_in_use import content_of, files_below
from support.ports import free_address
from support.waiting import until

pytestmark = pytest.mark.timeout(240)
CANARY = "canary-prompt-7731"
TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass
class ReceivedSpan:
    service: str
    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]


@dataclass
class Collector:
    """An OTLP receiver (HTTP, protobuf)."""

    spans: list[ReceivedSpan] = field(default_factory=list)
    raw: bytes = b""

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.raw += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                attributes = {a.key: a.value.string_value or a.value.int_value for a in span.attributes}
                ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                self.spans.append(ReceivedSpan(service, span.name, *ids, attributes))
        return web.Response()

    def of(self, trace: str) -> list[ReceivedSpan]:
        return [span for span in self.spans if span.trace == trace]

    def one(self, trace: str, service: str, name: str) -> ReceivedSpan:
        (found,) = (span for span in self.of(trace) if span.service == service and span.name == name)
        return found


@contextlib.asynccontextmanager
async def collecting() -> AsyncIterator[tuple[Collector, str]]:
    collector = Collector()
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield collector, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def demo(state: Path, **more: str) -> AsyncIterator[str]:
    """Run `up --demo`; yield the manager's base URL."""
    manager, simulator = free_address(), free_address()
    environment = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "PYTHONPATH")} | {
        "STATE_DIR": str(state),
        "LISTEN_ADDR": manager,
        "GATEWAY_ADDR": free_address(),
        "SIMULATOR_LISTEN": simulator,
        "AUTOSCALER_ADDR": free_address(),
        "COMPUTE_BACKEND": "process",
        "MIN_AGENTS": "1",
        "LOG_FORMAT": "json",
        **more,
    }

    async def command(*arguments: str) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hypercore_agents", *arguments,
            env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()

    try:
        await command("up", "--demo", "--detach")
        yield f"http://{manager}"
    finally:
        await command("down", "--purge")


async def chat(http: aiohttp.ClientSession, url: str, traceparent: str, **more: Any) -> dict[str, Any]:
    body = {"user_id": "ada", "prompt": f"Say {CANARY}.", **more}
    async with http.post(f"{url}/v1/agent/chat", json=body, headers={"traceparent": traceparent}) as answer:
        document: dict[str, Any] = await answer.json()
        assert answer.status == 200, document
        return document


def log_lines(state: Path) -> list[dict[str, Any]]:
    """Return the log lines of all roles and agents."""
    files = [path for path in files_below(state) if "log" in path.name]
    written = b"\n".join(map(content_of, files))
    assert CANARY.encode() not in written
    return [json.loads(line) for line in written.splitlines() if line.startswith(b"{")]


async def test_one_trace_spans_client_to_api_and_appears_in_logs(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with (
        collecting() as (collector, endpoint),
        aiohttp.ClientSession() as http,
        demo(state, OTLP_ENDPOINT=endpoint, TRACE_SHARE="0") as url,
    ):
        answer = await chat(http, url, f"00-{TRACE}-{CLIENT}-01")
        ids = {name: answer[name] for name in ("session_id", "agent_id")} | {"user_id": "ada"}
        await until(lambda: len(collector.of(TRACE)) >= 6, what="the spans of a chat")
        manager = collector.one(TRACE, "hypercore-manager", "POST /v1/agent/chat")
        agent = collector.one(TRACE, "hypercore-agent", "POST /v1/agent/chat")
        turn = collector.one(TRACE, "hypercore-agent", "turn")
        cli = collector.one(TRACE, "hypercore-agent", "claude_cli")
        gateway = collector.one(TRACE, "hypercore-gateway", "POST")
        api = collector.one(TRACE, "hypercore-gateway", "claude_api")
        chain = [manager.parent, agent.parent, turn.parent, cli.parent, gateway.parent, api.parent]
        assert chain == [CLIENT, manager.id, agent.id, turn.id, cli.id, gateway.id]
        for span in (manager, agent, gateway):
            assert span.attributes | ids == span.attributes, span
            assert span.attributes["http.response.status_code"] == 200

        # the same CLI process serves a later trace; unsampled traces have no spans
        later, session = "1" * 32, answer["session_id"]
        await chat(http, url, f"00-{'2' * 32}-{CLIENT}-00", session_id=session)
        await chat(http, url, f"00-{later}-{CLIENT}-01", session_id=session)
        await until(lambda: len(collector.of(later)) >= 6, what="the spans of a later chat")
        assert {span.trace for span in collector.spans} == {TRACE, later}
        assert len(collector.of(TRACE)) == 6
        assert CANARY.encode() not in collector.raw
        assert b"needs-no-key" not in collector.raw

        lines = await asyncio.to_thread(log_lines, state)
        requests = [line for line in lines if line["event"] == "request" and line.get("trace_id") == TRACE]
        assert {line["role"] for line in requests} == {"manager", "agent", "gateway"}
        assert len(requests) == 3
        for line in requests:
            assert line | ids == line
            assert line["outcome"] == "ok"
            assert line["duration_ms"] >= line["first_byte_ms"] > 0
        assert len({line["request_id"] for line in requests if line["role"] != "gateway"}) == 1
