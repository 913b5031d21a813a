"""Rolls over HTTP: they replace a few agents at a time, lose no turn, and stop if new agents fail."""

import asyncio
from pathlib import Path
from typing import Any

from aiohttp import web

from hypercore_agents.store import agents
from support.manager_server import Deployment, StandInAgent, completed, deployed
from support.waiting import until


async def roll_of(deployment: Deployment) -> dict[str, Any]:
    status, pool = await deployment.call("GET", "/v1/pool")
    assert status == 200
    assert isinstance(pool["roll"], dict)
    return pool["roll"]


async def over(deployment: Deployment, status: str) -> dict[str, Any]:
    async def is_over() -> bool:
        return bool((await roll_of(deployment))["status"] != "rolling")

    await until(is_over, seconds=60)
    roll = await roll_of(deployment)
    assert roll["status"] == status, roll
    return roll


async def test_a_roll_replaces_every_agent_without_failing_a_turn(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=3, max_agents=4) as deployment:
        await deployment.warm(3)
        before = set(deployment.agents.running)
        release = asyncio.Event()

        async def slowly(agent: StandInAgent, body: dict[str, Any]) -> web.StreamResponse:
            await release.wait()
            return web.json_response(completed(agent, body))

        for agent in deployment.agents.running.values():
            agent.answer = lambda _, body, agent=agent: slowly(agent, body)
        turns = [asyncio.create_task(deployment.chat()) for _ in range(6)]
        await until(lambda: sum(len(agent.chats) for agent in deployment.agents.running.values()) == 6)

        config = {"cores": 2, "memory": 1024, "system_prompt": "be brief"}
        status, roll = await deployment.call("POST", "/v1/pool/roll", {"config": config, "at_once": 1})
        assert (status, roll["revision"], roll["status"], roll["remaining"]) == (202, 1, "rolling", 3)
        status, error = await deployment.call("POST", "/v1/pool/roll", {})
        assert (status, error["error"]["details"]) == (409, {"revision": 1})
        await until(lambda: len(set(deployment.agents.running) - before) >= 1)
        assert len(deployment.agents.running) <= 4, "never over MAX_AGENTS"
        release.set()
        assert [status for status, _ in await asyncio.gather(*turns)] == [200] * 6

        roll = await over(deployment, "done")
        assert (roll["updated"], roll["remaining"], roll["config"]["cores"]) == (3, 0, 2)
        assert not before & set(deployment.agents.running)
        assert {sandbox.request.cores for sandbox in deployment.host.sandboxes.values()} == {2}
        status, _ = await deployment.chat()
        assert status == 200
        (told,) = (chat for agent in deployment.agents.running.values() for chat in agent.chats)
        assert told["placement"]["options"]["system_prompt"] == "be brief"


async def test_a_roll_stops_if_new_agents_do_not_become_ready(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=2, max_agents=4, start_timeout=1) as deployment:
        await deployment.warm(2)
        before = set(deployment.agents.running)

        def mute(agent: StandInAgent) -> None:
            agent.ready = False

        deployment.agents.prepare = mute
        assert (await deployment.call("POST", "/v1/pool/roll", {"at_once": 2}))[0] == 202
        roll = await over(deployment, "stopped")
        assert "did not become ready" in roll["reason"]
        deployment.agents.prepare = lambda _: None
        assert before <= set(deployment.agents.running), "the old agents keep serving"
        assert (await deployment.chat())[0] == 200

        gone = sorted(before)[0]
        deployment.host.exit(gone, 1)
        await until(lambda: gone not in deployment.agents.running)
        await deployment.warm(2)
        async with deployment.database.read() as connection:
            rows = await agents.list_agents(connection)
        assert {row.revision for row in rows} == {0}, "new agents are as before the roll"


async def test_a_roll_to_an_image_keeps_the_configuration(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", images=True, min_agents=2, max_agents=3) as deployment:
        await deployment.warm(2)
        assert (await deployment.call("POST", "/v1/pool/roll", {"config": {"cores": 3}, "at_once": 2}))[0] == 202
        await over(deployment, "done")
        assert (await deployment.call("POST", "/v1/pool/roll", {"image": "registry.example/agent:2"}))[0] == 202
        roll = await over(deployment, "done")
        assert (roll["revision"], roll["image"]) == (2, "registry.example/agent:2")
        requests = [sandbox.request for sandbox in deployment.host.sandboxes.values()]
        assert {(request.image, request.cores) for request in requests} == {("registry.example/agent:2", 3)}


async def test_a_roll_on_a_full_host_drains_old_agents_first(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=2, max_agents=9) as deployment:
        deployment.host.max_sandboxes = 2
        await deployment.warm(2)
        before = set(deployment.agents.running)
        assert (await deployment.call("POST", "/v1/pool/roll", {}))[0] == 202
        roll = await over(deployment, "done")
        assert (roll["updated"], roll["remaining"]) == (2, 0)
        assert not before & set(deployment.agents.running)


async def test_a_roll_can_be_stopped_and_images_need_backend_support(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=1, max_agents=2) as deployment:
        await deployment.warm(1)
        assert (await deployment.call("DELETE", "/v1/pool/roll"))[0] == 404
        deployment.agents.enrols = False
        assert (await deployment.call("POST", "/v1/pool/roll", {}))[0] == 202
        status, roll = await deployment.call("DELETE", "/v1/pool/roll")
        assert (status, roll["status"], roll["reason"]) == (200, "stopped", "an operator stopped it")
        status, error = await deployment.call("POST", "/v1/pool/roll", {"image": "agent:2"})
        assert (status, error["error"]["details"]["field"]) == (400, "image")
        for body, field in (({"at_once": 0}, "at_once"), ({"colour": 1}, "colour"), ({"config": {"x": 1}}, "config")):
            status, error = await deployment.call("POST", "/v1/pool/roll", body)
            assert status == 400
            assert field in error["error"]["details"]["field"]
