"""Panels by agent and by error type remain readable with many agents, in a real Prometheus."""

import contextlib
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from fastapi import FastAPI, Response

from hypercore_agents.observability.metrics import CONTENT_TYPE
from panels import ROWS, resolved
from support.asgi_server import serving
from support.monitoring_servers import prometheus, query
from support.waiting import until

pytestmark = pytest.mark.prometheus
AGENTS = 30
BY_AGENT = ("agent_cpu_utilisation", "agent_memory_utilisation", "agent_cli_memory_bytes")
PANELS = {panel.title: panel for row in ROWS for panel in row.panels}


def exposition(scrapes: int) -> str:
    lines = [
        f'{name}{{instance="agent-{number}",kind="pool"}} {number / 100}'
        for name in BY_AGENT
        for number in range(AGENTS)
    ]
    for number in range(15):
        rising = scrapes if number < 12 else 0
        lines.append(
            f'agent_errors_total{{instance="agent-1",kind="pool",error_type="type-{number}"}} {rising * number}'
        )
    return "\n".join(lines) + "\n"


@contextlib.asynccontextmanager
async def scraped(folder: Path) -> Any:
    app = FastAPI()
    scrapes = 0

    @app.get("/metrics")
    async def page() -> Response:
        nonlocal scrapes
        scrapes += 1
        return Response(exposition(scrapes), media_type=CONTENT_TYPE)

    async with serving(app) as url:
        job = {
            "job_name": "agents",
            "honor_labels": True,
            "static_configs": [{"targets": [url.removeprefix("http://")]}],
        }
        path = folder / "prometheus.yml"
        path.write_text(yaml.safe_dump({"global": {"scrape_interval": "500ms"}, "scrape_configs": [job]}))
        async with prometheus(path) as base:
            yield base


async def lines(base: str, title: str) -> set[tuple[str, str]]:
    """The legend entries of a panel over the last minutes."""
    now = time.time()
    found = set()
    async with aiohttp.ClientSession() as http:
        for asked in PANELS[title].queries:
            parameters = {
                "query": resolved(asked.expression), "start": f"{now - 60:.0f}", "end": f"{now:.0f}", "step": "1"
            }  # fmt: skip
            async with http.get(f"{base}/api/v1/query_range", params=parameters) as answer:
                document = await answer.json()
            assert document["status"] == "success", document
            for series in document["data"]["result"]:
                labels = series["metric"]
                found.add((asked.legend, labels.get("instance") or labels.get("error_type") or ""))
    return found


async def test_thirty_agents_are_ten_lines_and_two_quantiles(tmp_path: Path) -> None:
    async with scraped(tmp_path) as base:
        # The panels' subqueries evaluate every fifth second, so their first data comes up to 5 s after the start.
        for expression in (
            "count(max_over_time(agent_cpu_utilisation[5m:5s])) > 0",
            'count(max_over_time((rate(agent_errors_total{error_type="type-11"}[1m]) > 0)[5m:5s])) > 0',
        ):
            await until(lambda e=expression: query(base, e), what=expression)  # type: ignore[misc]
        highest = {("{{instance}}", f"agent-{number}") for number in range(AGENTS - 10, AGENTS)}
        for title in ("CPU by agent", "Memory by agent", "Memory of Claude CLIs"):
            assert await lines(base, title) == highest | {("p50 of agents", ""), ("p95 of agents", "")}, title
        kinds = {("{{error_type}}", f"type-{number}") for number in range(2, 12)}
        assert await lines(base, "Errors by type") == kinds | {("all", "")}
