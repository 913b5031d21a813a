"""The load test: as a process against a manager with stand-in agents, and its arithmetic."""

import asyncio
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from hypercore_agents.loadtest.report import Report, WaitTimes
from hypercore_agents.loadtest.scenario import Scenario, agents_for
from support.manager_server import Deployment, StandInAgent, completed, deployed, frame

SCRIPT = Path(__file__).parents[1] / "load-test-claude-agents.py"
CANARY = "sk-ant-canary-0b7d66e1c2a94f35"


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path / "state") as deployment:
        yield deployment


def answering(agent: StandInAgent, *, fail_every: int = 0) -> None:
    async def answer(_: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if fail_every and len(agent.chats) % fail_every == 0:
            error = {"type": "model_error", "message": "no", "request_id": "r", "retryable": False}
            return web.json_response({"error": error}, status=502)
        result = completed(agent, body)
        started = {**{k: result[k] for k in ("session_id", "agent_id", "turn", "tools")}, "notices": []}
        frames = frame("session", started) + frame("delta", {"text": "hi"}) + frame("result", result)
        return web.Response(body=frames, content_type="text/event-stream")

    agent.answer = answer


async def run(*arguments: str) -> tuple[int | None, str, str]:
    inherited = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "LANG", "HOME")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SCRIPT), *arguments, env=inherited,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(90):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_a_run_counts_its_turns_and_deletes_its_agents(site: Deployment, tmp_path: Path) -> None:
    agents: list[StandInAgent] = []

    def prepare(agent: StandInAgent) -> None:
        agents.append(agent)
        answering(agent)

    site.agents.prepare = prepare
    output = tmp_path / "results.json"
    code, out, err = await run(
        "--api-url", site.url, "--anthropic-key", CANARY, "--users", "3", "--requests", "4", "--ramp-up", "0.1",
        "--interval", "0.05", "--output", str(output),
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(output.read_text())
    assert result["turns"]["planned"] == result["turns"]["succeeded"] == 12
    assert result["turns"]["success_rate"] == 1.0
    assert result["latency_ms"]["turn"]["count"] == result["latency_ms"]["first_text"]["count"] == 12
    assert result["latency_ms"]["turn"]["p50"] <= result["latency_ms"]["turn"]["max"]
    assert result["tokens"] == 24
    assert "12/12 turns" in err
    assert "12 of 12" in out
    assert len(agents) == 1
    assert len({chat["placement"]["session_id"] for chat in agents[0].chats}) == 3
    assert (await site.stats())["total_agents"] == 0
    assert CANARY not in out + err + output.read_text()


async def test_a_stall_delays_every_turn_that_is_due_during_it(site: Deployment) -> None:
    """If turns were timed from their sending, only one of the four would be slow, and the median fast."""

    def prepare(agent: StandInAgent) -> None:
        answering(agent)
        quick = agent.answer
        assert quick is not None

        async def answer(request: web.Request, body: dict[str, Any]) -> Any:
            if len(agent.chats) == 1:
                await asyncio.sleep(1.0)
            return await quick(request, body)

        agent.answer = answer

    site.agents.prepare = prepare
    code, out, err = await run("--api-url", site.url, "--agents", "1", "--users", "1", "--requests", "4",
                               "--ramp-up", "0", "--interval", "0.1", "--json")  # fmt: skip
    assert code == 0, err
    turns = json.loads(out)["latency_ms"]["turn"]
    assert turns["count"] == 4
    assert turns["p50"] >= 700, "the second turn was due 0.1 s, the third 0.2 s after the first"


async def test_too_many_failures_set_the_exit_code(site: Deployment) -> None:
    site.agents.prepare = lambda agent: answering(agent, fail_every=2)
    arguments = ("--api-url", site.url, "--agents", "1", "--users", "1", "--requests", "4", "--ramp-up", "0",
                 "--interval", "0", "--json")  # fmt: skip
    code, out, _ = await run(*arguments)
    result = json.loads(out)
    assert (code, result["turns"]["succeeded"], result["errors"]) == (1, 2, {"model_error": 2})
    code, _, _ = await run(*arguments, "--min-success", "0.5")
    assert code == 0


async def test_a_run_that_cannot_start_reports_the_reason(site: Deployment) -> None:
    code, _, err = await run("--api-url", "http://127.0.0.1:9")
    assert (code, "hypercore-agents up" in err) == (3, True)
    code, _, err = await run("--api-url", site.url, "--anthropic-key", CANARY, "--agents", "0")
    assert code == 2
    assert CANARY not in err
    code, _, err = await run("--api-url", site.url, "--output", "/nowhere/results.json")
    assert (code, "/nowhere" in err) == (2, True)


def test_turns_are_due_by_the_timetable_not_by_the_previous_turn() -> None:
    scenario = Scenario(users=4, requests=3, ramp_up=8, interval=2.0)
    assert [scenario.start_of(user) for user in range(4)] == [0, 2, 4, 6]
    assert [scenario.due(1, request) for request in range(3)] == [2, 4, 6]
    assert [Scenario(interval=0).due(0, request) for request in range(2)] == [0, None]
    assert (agents_for(1), agents_for(100), agents_for(101)) == (1, 1, 2)


def test_percentiles_have_three_digits_and_unsent_turns_are_failures() -> None:
    waits = WaitTimes()
    for number in range(1, 1001):
        waits.add(number / 1000)
    assert abs(waits.at(95) - 950) < 1
    assert abs(waits.summary()["max"] - 1000) < 1
    report = Report(planned=10)
    report.succeeded = 5
    assert report.success_rate == 0.5


@pytest.mark.parametrize("venv", [sys.prefix, "/missing"])
def test_the_script_runs_from_a_checkout_without_installed_packages(tmp_path: Path, venv: str) -> None:
    """`-S -E` gives an interpreter without packages, like that of a fresh machine."""
    environment = {"PATH": os.environ["PATH"], "HYPERCORE_VENV": venv}
    command = [sys.executable, "-S", "-E", str(SCRIPT), "--api-url", "http://127.0.0.1:1", "--users", "1"]
    result = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    if venv == sys.prefix:
        assert result.returncode == 3
        assert "did not answer" in result.stderr
    else:
        assert result.returncode == 1
        assert "pip install -r" in result.stderr
        assert "Traceback" not in result.stderr


def test_the_scripts_requirements_are_the_projects() -> None:
    project = tomllib.loads((SCRIPT.parents[1] / "pyproject.toml").read_text())["project"]
    known = {*project["dependencies"], *project["optional-dependencies"]["loadtest"]}
    lines = SCRIPT.with_name("requirements-test.txt").read_text().splitlines()
    assert {line for line in lines if not line.startswith("#")} <= known
