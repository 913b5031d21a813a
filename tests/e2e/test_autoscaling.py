"""The pool follows its load: real manager, real Prometheus that finds and scrapes agents through it, real autoscaler.

Agents are stand-ins that hold a turn for a moment. Users arrive, chat and leave; no user sees an error while agents
start and drain. Skipped where no `prometheus` is installed (Debian's package of that name).
"""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from hypercore_agents.autoscaler.app import create_app
from hypercore_agents.autoscaler.settings import AutoscalerSettings
from hypercore_agents.kit.aio.tasks import Tasks
from support.asgi_server import serving
from support.autoscaler_peers import prometheus
from support.manager_server import Deployment, StandInAgent, completed, deployed
from support.waiting import until

pytestmark = pytest.mark.prometheus

CAPACITY = 10
TURNS = 4
CONFIGURATION = """
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - job_name: manager
    static_configs: [{{targets: ["{manager}"]}}]
  - job_name: agents
    http_sd_configs: [{{url: "http://{manager}/v1/prometheus/targets", refresh_interval: 1s}}]
"""


class Crowd:
    """Users that chat, each in one session after another; `size` can change at any time."""

    def __init__(self, deployment: Deployment) -> None:
        self.size = 0
        self.served = 0
        self.errors: list[Any] = []
        self._deployment = deployment
        self._tasks = Tasks("crowd")

    def grow_to(self, size: int) -> None:
        for number in range(self.size, size):
            self._tasks.start("user", self._user(number))
        self.size = size

    async def close(self) -> None:
        self.size = 0
        await self._tasks.finish(within=20)

    async def _user(self, number: int) -> None:
        user_id = f"user-{number}"
        while number < self.size:
            session: dict[str, str] = {}
            for turn in range(1, TURNS + 1):
                status, answer = await self._deployment.chat("hello", user_id=user_id, **session)
                if status != 200 or answer["turn"] != turn:
                    self.errors.append((status, answer))
                    return
                session = {"session_id": answer["session_id"]}
                self.served += 1
            await self._deployment.call("DELETE", f"/v1/agent/session/{answer['session_id']}")


async def slowly(agent: StandInAgent, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(0.4)  # the duration of a turn, so that users overlap
    return web.json_response(completed(agent, body))


async def test_the_pool_follows_its_load_without_failed_turns(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        deployment = await stack.enter_async_context(
            deployed(tmp_path / "state", min_agents=1, max_agents=6, max_concurrent_requests=CAPACITY)
        )

        def prepare(agent: StandInAgent) -> None:
            agent.answer = lambda _, body: slowly(agent, body)

        deployment.agents.prepare = prepare
        await deployment.warm(1)
        address = deployment.url.removeprefix("http://")
        url = await stack.enter_async_context(prometheus(CONFIGURATION.format(manager=address), tmp_path))
        settings = AutoscalerSettings(
            _env_file=None,
            manager_url=deployment.url,
            prometheus_url=url,
            min_agents=1,
            max_agents=6,
            target_sessions_per_agent=CAPACITY,
            autoscaler_interval=0.5,
            spawn_seconds=1,
            stabilisation_window=4,
            consolidation_window=4,
            panic_window=2,
        )
        scaler = await stack.enter_async_context(serving(create_app(settings)))
        crowd = Crowd(deployment)
        stack.push_async_callback(crowd.close)

        async def pool() -> dict[str, Any]:
            status, body = await deployment.call("GET", "/v1/pool")
            assert status == 200
            assert isinstance(body, dict)
            return body

        async def decisions() -> list[dict[str, Any]]:
            async with deployment.http.get(f"{scaler}/v1/autoscaler/decisions") as answer:
                return list((await answer.json())["decisions"])

        async def has_capacity() -> bool:
            return int((await pool())["running"]) * CAPACITY >= crowd.size + 2

        async def has_signals() -> bool:
            return any(decision["problem"] is None for decision in await decisions())

        await until(has_signals, seconds=30)
        crowd.grow_to(4)
        for size in range(5, 25):
            await until(has_capacity, seconds=40)
            crowd.grow_to(size)
            await asyncio.sleep(0.25)  # the rate at which users arrive

        async def grown() -> bool:
            return int((await pool())["running"]) >= 3

        await until(grown, seconds=40)
        returning: list[dict[str, Any]] = []
        while len({answer["agent_id"] for answer in returning}) < 2:
            assert len(returning) < 5, "placement is even"
            status, answer = await deployment.chat("hello", user_id="returning")
            assert status == 200
            returning.append(answer)
        served = crowd.served
        crowd.size = 2

        async def shrunk() -> bool:
            found = await pool()
            return (found["desired"], found["running"], found["draining"]) == (1, 1, 0)

        await until(shrunk, seconds=60)
        await until(lambda: crowd.served > served + 10, seconds=20)
        await crowd.close()
        assert crowd.errors == []
        for before in returning:  # sessions of drained agents continue on another agent
            status, after = await deployment.chat("again", user_id="returning", session_id=before["session_id"])
            assert (status, after["turn"], after["agent_id"]) == (200, 2, next(iter(deployment.agents.running)))
        actions = {(decision["action"], decision["outcome"]) for decision in await decisions()}
        assert {("grow", "applied"), ("shrink", "applied")} <= actions
        assert all(decision["detail"] for decision in await decisions())
