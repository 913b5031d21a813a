"""The manager when agents, sandboxes, clients or managers fail: nothing leaks, and no unconfirmed result is
recorded."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.internal import Heartbeat
from hypercore_agents.compute.base import InsufficientResources, SandboxError, SandboxRequest
from hypercore_agents.compute.testing import Fault, FaultKind, Operation
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.manager.sessions import turn_relay
from hypercore_agents.store import agents, heartbeats, leases, placement, pools, session_tokens, sessions, turns
from support.manager_server import (
    Deployment,
    StandInAgent,
    aiohttp_served,
    completed,
    deployed,
    frame,
    managing,
    settings_for,
)
from support.waiting import until

SPAWN = {"user_id": "ada"}


@pytest_asyncio.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path / "state", start_timeout=1) as running:
        yield running


async def placed(deployment: Deployment) -> int:
    async with deployment.database.read() as connection:
        return await placement.count_placed(connection)


async def row_of(deployment: Deployment, agent_id: str) -> agents.AgentRow:
    async with deployment.database.read() as connection:
        row = await agents.get_agent(connection, agent_id)
    assert row is not None
    return row


async def in_state(deployment: Deployment, agent_id: str, state: AgentState) -> bool:
    return (await row_of(deployment, agent_id)).state is state


# Turns


async def test_a_dead_agent_gives_502_leaves_no_session_and_is_replaced(pooled: Deployment) -> None:
    agent = pooled.agent
    assert agent.runner is not None
    await agent.runner.cleanup()
    pooled.host.exit(agent.agent_id, -9)
    status, answer = await pooled.chat()
    assert (status, answer["error"]["type"]) == (502, "agent_unreachable")
    assert await placed(pooled) == 0
    await until(lambda: in_state(pooled, agent.agent_id, AgentState.FAILED))
    assert "status -9" in ((await row_of(pooled, agent.agent_id)).error or "")
    await pooled.warm(1)
    assert pooled.agent.agent_id != agent.agent_id
    assert (await pooled.chat())[0] == 200


@pytest.mark.parametrize("fault", ["hangs", "accepts no turns"])
async def test_an_agent_without_heartbeats_is_replaced(tmp_path: Path, fault: str) -> None:
    async def ready(_: web.Request) -> web.Response:
        return web.json_response({})

    gateway = web.Application()
    gateway.router.add_get("/ready", ready)
    async with (
        aiohttp_served(gateway) as gateway_url,
        deployed(tmp_path / "state", min_agents=2, health_check_interval=3, gateway_url=gateway_url) as deployment,
    ):
        silent: set[str] = set()

        async def beat() -> None:
            for agent_id in set(deployment.agents.running) - silent:
                async with deployment.database.write() as connection:
                    unready = fault == "accepts no turns" and agent_id in sick
                    beat = Heartbeat(
                        ready=not unready, sessions=0, live=0, running=0, waiting=0, memory_mb=1, memory_limit_mb=2
                    )
                    await heartbeats.put_heartbeat(connection, agent_id, beat, now=time.time())

        sick: set[str] = set()
        heartbeat_tasks = Tasks("test")
        heartbeat_tasks.repeat("beat", beat, every=0.1)
        await deployment.warm(2)
        unhealthy, healthy = sorted(deployment.agents.running)
        sick.add(unhealthy)
        if fault == "hangs":
            silent.add(unhealthy)
            deployment.agents.running[unhealthy].hangs = True
        await until(lambda: unhealthy not in deployment.agents.running, seconds=30)
        await deployment.warm(2)
        assert healthy in deployment.agents.running, "the healthy agent is not replaced"
        error = (await row_of(deployment, unhealthy)).error
        assert error is not None
        assert {"hangs": "does not respond", "accepts no turns": "accepts no turns"}[fault] in error
        await heartbeat_tasks.close()


async def test_a_stream_whose_agent_dies_ends_with_an_error_event(pooled: Deployment) -> None:
    agent = pooled.agent

    async def dying(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(frame("session", {"session_id": body["session_id"]}) + b"event: del")
        assert request.transport is not None
        request.transport.abort()
        return response

    agent.answer = dying
    body = {"user_id": "ada", "prompt": "hi", "stream": True}
    async with pooled.http.post(f"{pooled.url}/v1/agent/chat", json=body) as answer:
        text = await answer.text()
    frames = [part for part in text.split("\n\n") if part]
    assert [part.splitlines()[0] for part in frames] == ["event: session", "event: error"]
    error = json.loads(frames[1].splitlines()[1].removeprefix("data: "))["error"]
    assert error["type"] == "agent_unreachable"
    agent.answer = None
    session_id = json.loads(frames[0].splitlines()[1].removeprefix("data: "))["session_id"]
    status, again = await pooled.chat(session_id=session_id)
    assert (status, again["turn"]) == (200, 2)


@pytest.mark.parametrize("status", [400, 429, 500, 503])
async def test_a_refused_first_turn_leaves_no_session(pooled: Deployment, status: int) -> None:
    agent = pooled.agent
    refusal = {"error": {"type": "rate_limited", "message": "m", "request_id": "r", "retryable": True}}

    async def refusing(_: web.Request, body: dict[str, Any]) -> web.Response:
        return web.json_response(refusal, status=status, headers={"retry-after": "7"})

    agent.answer = refusing
    found, answer = await pooled.chat()
    assert (found, answer) == (status, refusal)
    assert await placed(pooled) == 0
    await until(lambda: agent.deleted == [agent.chats[0]["session_id"]])


async def test_a_refused_later_turn_keeps_the_session(pooled: Deployment) -> None:
    agent = pooled.agent
    _, first = await pooled.chat()

    async def refusing(_: web.Request, body: dict[str, Any]) -> web.Response:
        return web.json_response({}, status=503)

    agent.answer = refusing
    assert (await pooled.chat(session_id=first["session_id"]))[0] == 503
    agent.answer = None
    assert (await pooled.chat(session_id=first["session_id"]))[0] == 200
    assert agent.deleted == []


async def test_an_agent_that_times_out_gives_504(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_relay, "SLACK_SECONDS", 0.1)
    _, agent = await deployment.call("POST", "/v1/agents/spawn", {**SPAWN, "timeout": 1})
    silent = deployment.agent

    async def hanging(_: web.Request, body: dict[str, Any]) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    silent.answer = hanging
    status, answer = await deployment.call(
        "POST", f"/agents/{agent['agent_id']}/v1/agent/chat", {**SPAWN, "prompt": "hi"}
    )
    assert (status, answer["error"]["type"]) == (504, "deadline_exceeded")
    await until(lambda: silent.disconnected == 1)
    assert await placed(deployment) == 0


async def test_a_disconnecting_client_ends_its_turn_at_the_agent(pooled: Deployment) -> None:
    agent = pooled.agent

    async def slow(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if not body["stream"]:
            await asyncio.Event().wait()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(frame("session", {"session_id": body["session_id"]}))
        await asyncio.Event().wait()
        return response

    agent.answer = slow
    body = {"user_id": "ada", "prompt": "hi", "stream": True}
    async with pooled.http.post(f"{pooled.url}/v1/agent/chat", json=body) as answer:
        await answer.content.readuntil(b"\n\n")
    await until(lambda: agent.disconnected == 1)
    assert await placed(pooled) == 1, "the client has the id of this session"
    asking = asyncio.create_task(pooled.chat("no stream"))
    await until(lambda: len(agent.chats) == 2)
    asking.cancel()
    await until(lambda: agent.disconnected == 2)

    async def known_only() -> bool:
        return await placed(pooled) == 1

    await until(known_only)
    agent.answer = None
    assert (await pooled.chat(session_id=agent.chats[0]["session_id"]))[0] == 200


async def test_a_dead_managers_turn_is_released(pooled: Deployment) -> None:
    _, first = await pooled.chat()
    async with pooled.database.write() as connection:
        await leases.take_lease(connection, "manager:dead", "dead", now=0.0, seconds=15)
        row = await turns.begin_turn(
            connection, first["session_id"], holder="dead", max_tokens=None, temperature=None, now=1.0
        )
    assert row is not None
    status, second = await pooled.chat(session_id=first["session_id"])
    assert (status, second["turn"]) == (200, 3)


# Starts and stops


async def test_a_failed_start_is_retried_once(deployment: Deployment) -> None:
    deployment.backend.inject(Operation.START, Fault(FaultKind.FAILS, times=1))
    status, agent = await deployment.call("POST", "/v1/agents/spawn", SPAWN)
    assert (status, agent["status"]) == (200, "running")
    assert (await row_of(deployment, agent["agent_id"])).attempts == 2


@pytest.mark.parametrize(
    ("fault", "status", "kind", "says"),
    [
        (Fault(FaultKind.FAILS, error=SandboxError("the disk is full")), 503, "unavailable", "disk is full"),
        (Fault(FaultKind.FAILS, error=InsufficientResources("8 of 8 MB taken")), 503, "at_capacity", "8 of 8"),
        (Fault(FaultKind.FAILS, error=RuntimeError("a defect")), 503, "unavailable", "backend"),
        (Fault(FaultKind.FAILS_AFTER), 503, "unavailable", ""),
        (Fault(FaultKind.NEVER), 503, "unavailable", "did not start"),
        (Fault(FaultKind.LIES), 502, "agent_unreachable", "vanished"),
    ],
    ids=["fails", "full", "defect", "fails half-way", "never answers", "lies"],
)
async def test_a_failed_start_is_explained_and_leaves_nothing(
    deployment: Deployment, fault: Fault, status: int, kind: str, says: str
) -> None:
    deployment.backend.inject(Operation.START, fault)
    found, answer = await deployment.call("POST", "/v1/agents/spawn", SPAWN)
    assert (found, answer["error"]["type"]) == (status, kind)
    assert says in answer["error"]["message"]
    agent_id = answer["error"]["details"]["agent_id"]
    await until(lambda: in_state(deployment, agent_id, AgentState.FAILED))
    assert deployment.host.sandboxes == {}
    assert deployment.agents.running == {}
    _, view = await deployment.call("GET", "/v1/agents/get", agent_id=agent_id)
    assert says in view["error"]
    assert (await deployment.stats())["total_agents"] == 0


async def test_a_spawn_that_the_backend_refuses_is_a_bad_request(deployment: Deployment) -> None:
    status, answer = await deployment.call("POST", "/v1/agents/spawn", {**SPAWN, "gpu_quota": 100})
    assert (status, answer["error"]["type"]) == (400, "invalid_request")
    assert "GPU" in answer["error"]["message"]


async def test_an_agent_that_does_not_become_ready_fails_in_time(deployment: Deployment) -> None:
    deployment.agents.enrols = False
    status, answer = await deployment.call("POST", "/v1/agents/spawn", SPAWN)
    assert (status, answer["error"]["type"]) == (504, "deadline_exceeded")
    assert "enrol" in answer["error"]["message"]
    deployment.agents.enrols = True

    def unready(agent: StandInAgent) -> None:
        agent.ready = False

    deployment.agents.prepare = unready
    status, answer = await deployment.call("POST", "/v1/agents/spawn", SPAWN)
    assert status == 504
    assert "ready" in answer["error"]["message"]
    await until(lambda: deployment.host.sandboxes == {})


async def test_an_agent_that_ends_while_it_starts_fails_at_once(deployment: Deployment) -> None:
    deployment.agents.enrols = False
    spawning = asyncio.create_task(deployment.call("POST", "/v1/agents/spawn", SPAWN))
    await until(lambda: len(deployment.host.sandboxes) == 1)
    deployment.host.exit(next(iter(deployment.host.sandboxes)), 3)
    status, answer = await spawning
    assert (status, answer["error"]["type"]) == (502, "agent_unreachable")
    assert "status 3" in answer["error"]["message"]


@pytest.mark.parametrize("kind", [FaultKind.FAILS, FaultKind.LIES])
async def test_a_failed_stop_is_not_recorded_as_stopped(deployment: Deployment, kind: FaultKind) -> None:
    _, agent = await deployment.call("POST", "/v1/agents/spawn", SPAWN)
    agent_id = agent["agent_id"]
    deployment.backend.inject(Operation.STOP, Fault(kind))
    deleting = asyncio.create_task(deployment.call("DELETE", "/v1/agents/delete", agent_id=agent_id))

    def tries() -> int:
        return sum(call.operation is Operation.STOP for call in deployment.backend.calls)

    await until(lambda: tries() >= 2)
    assert await in_state(deployment, agent_id, AgentState.DRAINING)
    assert agent_id in deployment.host.sandboxes
    assert not deleting.done()
    deployment.backend.heal()
    assert (await deleting)[1] == {"agent_id": agent_id, "status": "stopped"}
    assert deployment.host.sandboxes == {}


async def test_an_agent_deleted_while_it_starts_leaves_no_sandbox(deployment: Deployment) -> None:
    deployment.agents.enrols = False
    _, agent = await deployment.call("POST", "/v1/agents/spawn", SPAWN, wait="false")
    await until(lambda: len(deployment.host.sandboxes) == 1)
    status, deleted = await deployment.call("DELETE", "/v1/agents/delete", agent_id=agent["agent_id"])
    assert (status, deleted["status"]) == (200, "stopped")
    assert deployment.host.sandboxes == {}


async def test_sessions_of_a_dedicated_agent_end_with_it(deployment: Deployment) -> None:
    _, agent = await deployment.call("POST", "/v1/agents/spawn", SPAWN)
    chat = f"/agents/{agent['agent_id']}/v1/agent/chat"
    _, first = await deployment.call("POST", chat, {**SPAWN, "prompt": "hi"})
    deployment.host.exit(agent["agent_id"], 1)
    await until(lambda: in_state(deployment, agent["agent_id"], AgentState.FAILED))
    assert await placed(deployment) == 0
    body = {**SPAWN, "prompt": "hi", "session_id": first["session_id"]}
    assert (await deployment.call("POST", "/v1/agent/chat", body))[0] == 404
    assert (await deployment.call("POST", chat, {**SPAWN, "prompt": "hi"}))[0] == 404


@pytest.mark.parametrize("kind", [FaultKind.FAILS, FaultKind.LIES, FaultKind.NEVER])
async def test_a_backend_that_cannot_list_fails_no_agent(deployment: Deployment, kind: FaultKind) -> None:
    _, agent = await deployment.call("POST", "/v1/agents/spawn", SPAWN)
    before = len(deployment.backend.calls)
    deployment.backend.inject(Operation.LIST, Fault(kind))

    def listed() -> int:
        return sum(call.operation is Operation.LIST for call in list(deployment.backend.calls)[before:])

    await until(lambda: listed() >= (1 if kind is FaultKind.NEVER else 2))
    assert (await deployment.call("GET", f"/agents/{agent['agent_id']}/health"))[0] == 200
    assert await in_state(deployment, agent["agent_id"], AgentState.RUNNING)
    deployment.backend.heal()


# The pool


async def test_the_pool_follows_its_size_and_drains_the_emptiest_agents(pooled: Deployment) -> None:
    async with pooled.database.write() as connection:
        assert await pools.set_pool(connection, 3, version=None, now=1.0)
    await pooled.warm(3)
    _, kept = await pooled.chat()
    async with pooled.database.write() as connection:
        assert await pools.set_pool(connection, 1, version=1, now=2.0)
    await pooled.warm(1)
    await until(lambda: list(pooled.agents.running) == [kept["agent_id"]])
    assert (await pooled.chat(session_id=kept["session_id"]))[0] == 200


async def test_a_draining_agent_of_the_pool_finishes_its_turn(pooled: Deployment) -> None:
    busy = pooled.agent
    proceed = asyncio.Event()

    async def slow(_: web.Request, body: dict[str, Any]) -> web.Response:
        await proceed.wait()
        return web.json_response(completed(busy, body))

    busy.answer = slow
    asking = asyncio.create_task(pooled.chat())
    await until(lambda: len(busy.chats) == 1)
    async with pooled.database.write() as connection:
        await agents.want_stopped(connection, busy.agent_id, now=1.0)
    await until(lambda: in_state(pooled, busy.agent_id, AgentState.DRAINING))
    await pooled.warm(1)
    assert busy.agent_id in pooled.host.sandboxes
    proceed.set()
    assert (await asking)[0] == 200
    await until(lambda: in_state(pooled, busy.agent_id, AgentState.STOPPED))


async def test_a_pool_recovers_with_its_backend_and_leaves_no_orphans(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=2, max_agents=3, starts_at_once=1) as deployment:
        deployment.backend.inject(Operation.START, Fault(FaultKind.FAILS))

        def starts() -> int:
            return sum(call.operation is Operation.START for call in deployment.backend.calls)

        await until(lambda: starts() >= 3)
        assert (await deployment.stats())["pool"]["running"] == 0
        deployment.backend.heal()
        await deployment.warm(2)
        assert len(deployment.host.sandboxes) == 2


async def test_a_session_of_a_lost_agent_continues_on_another(pooled: Deployment) -> None:
    lost = pooled.agent
    _, first = await pooled.chat()
    pooled.host.exit(lost.agent_id, 1)
    await until(lambda: in_state(pooled, lost.agent_id, AgentState.FAILED))
    _, view = await pooled.call("GET", f"/v1/agent/session/{first['session_id']}")
    assert view["state"] == "parked" or view["agent_id"] != lost.agent_id
    await pooled.warm(1)
    status, second = await pooled.chat("again", session_id=first["session_id"])
    assert (status, second["turn"], second["agent_id"]) == (200, 2, pooled.agent.agent_id)
    assert pooled.agent.chats[0]["placement"]["generation"] == 2
    status, third = await pooled.chat("again", session_id=first["session_id"])
    assert (status, third["turn"], third["agent_id"]) == (200, 3, second["agent_id"]), "it stays on its agent"
    assert await placed(pooled) == 1


async def test_busy_sessions_leave_a_draining_agent_after_their_turn(
    pooled: Deployment,
) -> None:
    old = pooled.agent
    _, idle = await pooled.chat()
    proceed = asyncio.Event()

    async def slow(_: web.Request, body: dict[str, Any]) -> web.Response:
        await proceed.wait()
        return web.json_response(completed(old, body))

    old.answer = slow
    asking = asyncio.create_task(pooled.chat())
    await until(lambda: len(old.chats) == 2)
    async with pooled.database.write() as connection:
        await agents.want_stopped(connection, old.agent_id, now=1.0)
    await until(lambda: in_state(pooled, old.agent_id, AgentState.DRAINING))
    await pooled.warm(1)
    status, moved = await pooled.chat("again", session_id=idle["session_id"])
    assert (status, moved["turn"]) == (200, 2)
    assert moved["agent_id"] != old.agent_id
    assert old.agent_id in pooled.host.sandboxes, "its turn is still running"
    proceed.set()
    status, busy = await asking
    assert (status, busy["agent_id"]) == (200, old.agent_id)
    await until(lambda: in_state(pooled, old.agent_id, AgentState.STOPPED))
    status, moved = await pooled.chat("again", session_id=busy["session_id"])
    assert (status, moved["turn"]) == (200, 2)


async def test_a_session_stays_placed_until_its_agent_has_sent_its_data(
    pooled: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway accepts files and events of a session only from the agent on which it is placed."""
    old = pooled.agent
    _, idle = await pooled.chat()
    at_its_end: list[bool] = []
    cleanup = web.AppRunner.cleanup

    async def last_words(runner: web.AppRunner) -> None:
        if runner is old.runner:
            async with pooled.database.read() as connection:
                placed_here = await session_tokens.get_placed(connection, idle["session_id"], old.agent_id)
            at_its_end.append(placed_here is not None)
        await cleanup(runner)

    monkeypatch.setattr(web.AppRunner, "cleanup", last_words)
    async with pooled.database.write() as connection:
        await agents.want_stopped(connection, old.agent_id, now=1.0)
    await until(lambda: in_state(pooled, old.agent_id, AgentState.STOPPED))
    assert at_its_end == [True]
    async with pooled.database.read() as connection:
        row = await sessions.get_session(connection, idle["session_id"])
    assert row is not None
    assert row.agent_id is None, "then it is unplaced"


async def test_a_session_without_a_free_place_gets_retry_after(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=1, max_agents=1, max_concurrent_requests=1) as deployment:
        await deployment.warm(1)
        _, first = await deployment.chat()
        lost = deployment.agent
        deployment.host.exit(lost.agent_id, 1)
        await until(lambda: in_state(deployment, lost.agent_id, AgentState.FAILED))
        await deployment.warm(1)
        _, other = await deployment.chat()
        status, answer = await deployment.chat("again", session_id=first["session_id"])
        assert (status, answer["error"]["type"]) == (503, "at_capacity")
        await deployment.call("DELETE", f"/v1/agent/session/{other['session_id']}")
        assert (await deployment.chat("again", session_id=first["session_id"]))[0] == 200


# Managers


async def test_a_new_manager_adopts_running_sandboxes(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state") as deployment:
        _, agent = await deployment.call("POST", "/v1/agents/spawn", SPAWN)
        chat = f"/agents/{agent['agent_id']}/v1/agent/chat"
        _, first = await deployment.call("POST", chat, {**SPAWN, "prompt": "hi"})
        async with managing(settings_for(tmp_path / "state"), deployment.backend) as successor:
            deployment.url = successor
            body = {**SPAWN, "prompt": "again", "session_id": first["session_id"]}
            status, second = await deployment.call("POST", "/v1/agent/chat", body)
            assert (status, second["turn"], second["agent_id"]) == (200, 2, agent["agent_id"])
            status, spawned = await deployment.call("POST", "/v1/agents/spawn", {"user_id": "bob"})
            assert (status, spawned["status"]) == (200, "running"), "the leader sees another manager's row"


async def test_orphaned_sandboxes_and_rows_are_cleaned_up(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state") as deployment:
        orphan = SandboxRequest("agent-00000000000000ff", 1, 128, "http://127.0.0.1:1", "s" * 43)
        await deployment.backend.inner.start(orphan)
        _, agent = await deployment.call("POST", "/v1/agents/spawn", SPAWN)
        await until(lambda: list(deployment.host.sandboxes) == [agent["agent_id"]])
        await deployment.backend.inner.stop(agent["agent_id"])
        await until(lambda: in_state(deployment, agent["agent_id"], AgentState.FAILED))
        assert "gone" in ((await row_of(deployment, agent["agent_id"])).error or "")


async def test_a_start_interrupted_by_a_manager_crash_is_finished(deployment: Deployment) -> None:
    _, agent = await deployment.call("POST", "/v1/agents/spawn", SPAWN)
    row = await row_of(deployment, agent["agent_id"])
    half = replace(
        row,
        agent_id="agent-00000000000000aa",
        kind=AgentKind.DEDICATED,
        state=AgentState.STARTING,
        attempts=1,
        address=None,
        bearer_sealed=None,
        running_at=None,
    )
    async with deployment.database.write() as connection:
        await agents.insert_agent(connection, half)
    await until(lambda: in_state(deployment, half.agent_id, AgentState.RUNNING))
    assert (await row_of(deployment, half.agent_id)).attempts == 2


@pytest.mark.parametrize("stops", [False, True])
async def test_agents_are_stopped_at_exit_only_if_configured(tmp_path: Path, stops: bool) -> None:
    async with deployed(tmp_path / "state", min_agents=2, stop_agents_on_exit=stops) as deployment:
        await deployment.warm(2)
        await deployment.call("POST", "/v1/agents/spawn", SPAWN)
        host, machine = deployment.host, deployment.agents
        deployment.on_manager_gone = lambda: left.append(len(host.sandboxes))
        left: list[int] = []
    assert left == [0 if stops else 3]
    assert machine.running == {}


async def test_a_store_failure_at_the_end_does_not_affect_the_response(
    pooled: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hypercore_agents.api.errors import Unavailable
    from hypercore_agents.manager.sessions.turns import Turns

    real = Turns.end
    failures = 2

    async def failing(self: Turns, turn: Any) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise Unavailable("the store does not answer")
        await real(self, turn)

    monkeypatch.setattr(Turns, "end", failing)
    status, first = await pooled.chat()
    assert status == 200
    status, second = await pooled.chat(session_id=first["session_id"])
    assert (status, second["turn"]) == (200, 2)


async def test_health_responds_although_a_backend_hangs(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hypercore_agents.manager.http import health

    monkeypatch.setattr(health, "CHECK_SECONDS", 0.1)
    monkeypatch.setattr(health, "CACHE_SECONDS", 0.0)
    deployment.backend.inject(Operation.LIST, Fault(FaultKind.NEVER))
    async with asyncio.timeout(5):
        status, found = await deployment.call("GET", "/health")
    assert status == 503
    assert "no response" in found["dependencies"]["backend"]["error"]
    deployment.backend.heal()
