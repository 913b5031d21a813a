"""Limits and usage of turns, with the real gateway and its store, the real agent and the real Claude CLI.

Usage, cost and limits in the SDK's results are unreliable (docs/CLAUDE_AGENT_SDK_INTEGRATION.md). These tests compare
the ledger and the gateway's limits with the simulator's requests. The module's tests share one site.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hypercore_agents.api.agents import AgentState
from hypercore_agents.gateway.app import create_app
from hypercore_agents.security.sealing import KeyRing
from hypercore_agents.store.agents import change_agent, get_agent
from hypercore_agents.store.database import sqlite_url
from hypercore_agents.store.keys import agent_owner
from hypercore_agents.store.signing import signed_until
from support.agent_server import Agent, StandInGateway, frames, served_agent, tool, turn
from support.asgi_server import serving
from support.gateway_server import POOL, Site, gateway_site
from support.simulator_fixtures import RunningSimulator
from support.waiting import until

MODEL = "claude-sonnet-5"
pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]


@asynccontextmanager
async def agent_at(site: Site, url: str, state: Path, **configuration: Any) -> AsyncIterator[Agent]:
    """Serve an agent that enrols at the gateway at `url`."""
    settings = {"max_concurrent": 100, "tools": True, **configuration}
    side = StandInGateway(secret=await site.allow_enrolment(POOL, configuration=settings))
    side.url = url
    await set_state(site, AgentState.STARTING)
    async with served_agent(side, state, agent_id=POOL) as agent:
        sealed = await set_state(site, AgentState.RUNNING)
        assert sealed is not None
        side.bearer = site.sealer.open(sealed, agent_owner(POOL))
        yield agent


async def set_state(site: Site, state: AgentState) -> bytes | None:
    """Set the pool agent's state; return its sealed bearer."""
    async with site.database.write() as connection:
        row = await get_agent(connection, POOL)
        assert row is not None
        assert await change_agent(connection, POOL, row.version, now=time.time(), state=state)
    return row.bearer_sealed


@dataclass
class Platform:
    """A gateway site with one agent."""

    site: Site
    agent: Agent

    async def chat(self, prompt: str, session_id: str, **more: Any) -> tuple[int, dict[str, Any]]:
        """Begin a turn like the manager, and run it on the agent."""
        return await chat_at(self.site, self.agent, prompt, session_id, **more)

    async def spent(self, session_id: str, field: str = "cost_micro_usd") -> int:
        """Sum a column of the ledger over a session."""
        return sum(getattr(entry, field) for entry in await self.site.entries() if entry.session_id == session_id)


async def chat_at(
    site: Site, agent: Agent, prompt: str, session_id: str, limits: dict[str, Any] | None = None, **options: Any
) -> tuple[int, dict[str, Any]]:
    number = await site.turn(session_id, **(limits or {}))
    body = turn(prompt, session_id, number=number, timeout=60, **{"model": MODEL, **options})
    return await agent.post("/v1/agent/chat", body)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def platform(
    simulator_process: RunningSimulator, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Platform]:
    folder = tmp_path_factory.mktemp("platform")
    async with (
        gateway_site(folder, sqlite_url(folder / "store.db"), simulator_process.url) as site,
        agent_at(site, site.url, folder / "agent") as agent,
    ):
        yield Platform(site, agent)


async def test_a_budget_survives_parking_and_restarts(platform: Platform, tmp_path: Path) -> None:
    site, agent = platform.site, platform.agent
    prompt = "[[tokens 300]]"
    measured = await site.session(model=MODEL)
    _, first = await platform.chat(prompt, measured, tools=[])
    budget = 1.5 * first["usage"]["cost_usd"]
    options: dict[str, Any] = {"tools": [], "max_budget_usd": budget}
    session_id = await site.session(**options)
    status, answer = await platform.chat(prompt, session_id, **options)
    assert (status, answer["status"]) == (200, "completed"), answer
    assert await agent.server.enrolled().get(session_id).park(), "the CLI's own cost count ends with its process"
    status, answer = await platform.chat(prompt, session_id, **options)
    assert status in (200, 403), answer
    spent = await platform.spent(session_id)
    assert 0.75 * budget * 1e6 <= spent <= budget * 1e6, "the second turn could use the rest of the budget and no more"
    status, refused = await platform.chat(prompt, session_id, **options)
    assert (status, refused["error"]["type"]) == (403, "budget_exceeded"), refused
    assert "max_budget_usd" in refused["error"]["message"]
    # A new gateway and a new agent share only the store with the old ones.
    async with serving(create_app(site.settings)) as url, agent_at(site, url, tmp_path / "agent") as another:
        status, refused = await chat_at(site, another, prompt, session_id, **options)
    assert (status, refused["error"]["type"]) == (403, "budget_exceeded"), refused
    assert await platform.spent(session_id) == spent


async def test_an_agent_with_an_invalid_token_takes_no_turns(
    simulator_process: RunningSimulator, tmp_path: Path
) -> None:
    async with (
        gateway_site(tmp_path, sqlite_url(tmp_path / "store.db"), simulator_process.url) as site,
        agent_at(site, site.url, tmp_path / "agent", heartbeat_seconds=0.1) as agent,
    ):
        ring = KeyRing.load(site.settings.key_path)
        async with site.database.read() as connection:
            expiries = await signed_until(connection)
        assert expiries[ring.primary] > time.time() + 3600, "`keys prune` needs the expiry of this key's last token"
        ring.rotated().keeping().save(site.settings.key_path)

        async def refuses() -> bool:
            async with agent.client.get(f"{agent.url}/ready") as answer:
                return answer.status == 503 and "no longer accepts this agent" in await answer.text()

        await until(refuses)
        ring.save(site.settings.key_path)
        await until(lambda: agent.server.not_ready() is None)


async def test_a_turns_usage_sums_all_its_model_requests(platform: Platform, simulator: RunningSimulator) -> None:
    """With a tool call between two model requests, with a cut and repeated stream, and with an interrupt."""
    session_id = await platform.site.session()
    looped = tool("Bash", command="true") + "[[tokens 20]]"
    for prompt, least in ((looped, 20), ("[[tokens 30]] [[rate 60]] [[fault cut times=1 after=12]]", 30)):
        before = (await platform.spent(session_id, "output_tokens"), len(simulator.requests(session_id)))
        status, answer = await platform.chat(prompt, session_id)
        assert status == 200, answer
        assert len(simulator.requests(session_id)) - before[1] == 2
        spent = await platform.spent(session_id, "output_tokens") - before[0]
        assert answer["usage"]["output_tokens"] == spent > least
    number = await platform.site.turn(session_id)
    body = turn("[[tokens 2000]] [[rate 100]]", session_id, number=number, stream=True, model=MODEL)
    agent, seen = platform.agent, []
    async with agent.client.post(f"{agent.url}/v1/agent/chat", json=body, headers=agent.headers) as answering:
        async for frame in frames(answering):
            seen.append(frame)
            if len(seen) == 10:
                await agent.post(f"/v1/agent/session/{session_id}/interrupt")
    assert seen[-1].data["status"] == "interrupted"
    assert 5 <= seen[-1].data["usage"]["output_tokens"] < 2000, "the SDK's own result reports zero"


async def test_max_tokens_and_temperature_apply_to_the_whole_turn(
    platform: Platform, simulator: RunningSimulator
) -> None:
    session_id = await platform.site.session()
    limits = {"max_tokens": 50, "temperature": 0.25}
    status, answer = await platform.chat("[[tokens 400]]", session_id, limits=limits)
    assert (status, answer["status"]) == (200, "max_tokens"), answer
    assert 0 < answer["usage"]["output_tokens"] <= 50
    bodies = [request["body"] for request in simulator.requests(session_id)]
    assert {body["temperature"] for body in bodies} == {0.25}
    assert max(body["max_tokens"] for body in bodies) == 50
    status, answer = await platform.chat("[[say whole]]", session_id)
    assert (status, answer["content"]) == (200, "whole"), "the limits applied to one turn only"
    assert "temperature" not in simulator.requests(session_id)[-1]["body"]


async def test_a_refused_api_connection_is_a_lost_connection(platform: Platform) -> None:
    """The gateway answers with its own 503, which the CLI reports like a 503 of the API."""
    session_id = await platform.site.session()
    status, answer = await platform.chat("[[fault refuse]]", session_id)
    assert (status, answer["error"]["type"]) == (502, "model_error"), answer
    assert "the Claude API closed the connection without a response" in answer["error"]["message"]
    assert "503" not in answer["error"]["message"]
    assert answer["error"]["retryable"]
    assert answer["error"]["details"] == {"api_status": None, "cause": "connection"}
