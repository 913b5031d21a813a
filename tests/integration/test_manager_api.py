"""The manager over HTTP, with a backend in memory whose agents are real servers on loopback."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from sqlalchemy import select, update

from hypercore_agents.api.ids import new_session_id
from hypercore_agents.manager import composition
from hypercore_agents.store import keys, ledger, sessions, tables, turn_queue
from support.manager_server import Deployment, StandInAgent, completed, deployed, frame
from support.waiting import until


@pytest.fixture(params=[1, 2], ids=["one-worker", "two-workers"])
def workers(request: pytest.FixtureRequest) -> int:
    return int(request.param)


plain = pytest.mark.parametrize(("store_url", "workers"), [("sqlite", 1)], indirect=True)
"""A deployment for tests that do not depend on the store or the number of workers."""


@pytest_asyncio.fixture
async def deployment(tmp_path: Path, store_url: str, workers: int) -> AsyncIterator[Deployment]:
    async with deployed(
        tmp_path / "state", workers=workers, database_url=store_url, max_agents_per_user=3, max_concurrent_requests=2
    ) as running:
        yield running


@pytest_asyncio.fixture
async def pooled(tmp_path: Path, store_url: str, workers: int) -> AsyncIterator[Deployment]:
    async with deployed(
        tmp_path / "state",
        workers=workers,
        database_url=store_url,
        min_agents=2,
        max_concurrent_requests=2,
        claude_model="claude-test",
        default_max_tokens=77,
    ) as running:
        await running.warm(2)
        yield running


async def spawn(deployment: Deployment, **body: Any) -> dict[str, Any]:
    status, agent = await deployment.call("POST", "/v1/agents/spawn", {"user_id": "ada", **body})
    assert status == 200, agent
    assert isinstance(agent, dict)
    return agent


async def test_a_deleted_agents_key_is_erased_from_the_stores_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composition, "PURGE_SECONDS", 0.05)
    store = tmp_path / "state" / "store.db"

    async def held() -> bool:
        return any(sealed in path.read_bytes() for path in store.parent.glob("store.db*"))

    async with deployed(tmp_path / "state") as deployment:
        agent = await spawn(deployment, anthropic_api_key="sk-test-12345678")
        async with deployment.database.read() as connection:
            row = await keys.first_key(connection, [keys.agent_owner(agent["agent_id"])])
        assert row is not None
        sealed = row.sealed
        assert await held()
        await deployment.call("DELETE", "/v1/agents/delete", agent_id=agent["agent_id"])

        async def gone() -> bool:
            return not await held()

        await until(gone, seconds=20)  # while other processes read and write


async def test_an_agent_is_spawned_shown_and_deleted(deployment: Deployment) -> None:
    agent = await spawn(deployment, cores=2, memory=512, tags={"team": "blue"}, anthropic_api_key="sk-test-12345678")
    agent_id = agent["agent_id"]
    assert agent["status"] == "running"
    assert agent["url"] == f"http://127.0.0.1:8080/agents/{agent_id}"
    assert agent["metrics_url"] == agent["url"] + "/metrics"
    assert (agent["cores"], agent["memory"], agent["tags"]) == (2, 512, {"team": "blue"})
    request = deployment.host.sandboxes[agent_id].request
    assert (request.cores, request.memory_mb, request.gateway_url) == (2, 512, "http://127.0.0.1:8090")
    assert request.environment["MAX_CONCURRENT_REQUESTS"] == "2"
    assert deployment.agents.refused_secrets == 0

    status, listed = await deployment.call("GET", "/v1/agents/list", user_id="ada")
    assert (status, listed["count"], listed["agents"][0]["agent_id"]) == (200, 1, agent_id)
    assert (await deployment.call("GET", "/v1/agents/list", user_id="bob"))[1]["count"] == 0
    stats = await deployment.stats()
    assert (stats["total_agents"], stats["users"], stats["agents_per_user"]) == (1, 1, {"ada": 1})

    status, page = await deployment.call("GET", f"/agents/{agent_id}/metrics")
    assert (status, page) == (200, "agent_active_sessions 0\n")
    assert (await deployment.call("GET", f"/agents/{agent_id}/v1/agent/stats"))[1] == {"agent_id": agent_id}

    status, deleted = await deployment.call("DELETE", "/v1/agents/delete", agent_id=agent_id)
    assert (status, deleted) == (200, {"agent_id": agent_id, "status": "stopped"})
    assert agent_id not in deployment.host.sandboxes
    assert (await deployment.call("GET", "/v1/agents/get", agent_id=agent_id))[1]["status"] == "stopped"
    assert (await deployment.call("GET", f"/agents/{agent_id}/health"))[0] == 404
    async with deployment.database.read() as connection:
        from hypercore_agents.store import keys

        assert await keys.first_key(connection, [keys.agent_owner(agent_id)]) is None


async def test_a_spawn_without_wait_responds_at_once(deployment: Deployment) -> None:
    status, agent = await deployment.call("POST", "/v1/agents/spawn", {"user_id": "ada"}, wait="false")
    assert (status, agent["status"]) == (202, "pending")

    async def runs() -> bool:
        found = (await deployment.call("GET", "/v1/agents/get", agent_id=agent["agent_id"]))[1]
        return bool(found["status"] == "running")

    await until(runs)


async def test_the_agent_quota_is_exact_under_concurrency(deployment: Deployment) -> None:
    answers = await asyncio.gather(*(deployment.call("POST", "/v1/agents/spawn", {"user_id": "ada"}) for _ in range(8)))
    statuses = sorted(status for status, _ in answers)
    assert statuses == [200, 200, 200, 429, 429, 429, 429, 429]
    refused = next(body for status, body in answers if status == 429)["error"]
    assert refused["details"] == {"limit": 3, "agents": 3}
    await spawn(deployment, user_id="bob")


@plain
async def test_a_bad_spawn_names_the_field(deployment: Deployment) -> None:
    bodies: list[tuple[dict[str, Any], str]] = [
        ({}, "user_id"),
        ({"user_id": "ada", "cores": 33}, "cores"),
        ({"user_id": "ada", "memory": 1}, "memory"),
        ({"user_id": "ada", "colour": "red"}, "colour"),
        ({"user_id": "ada", "mcp_servers": {"x": {"type": "http", "url": "http://x"}}}, "mcp_servers"),
        ({"user_id": "ada", "mcp_servers": {"x": {"command": "x", "env": {"TOKEN": "y"}}}}, "mcp_servers"),
        ({"user_id": "ada", "mcp_servers": {"x": {}}}, "mcp_servers.x.command"),
    ]
    for body, field in bodies:
        status, answer = await deployment.call("POST", "/v1/agents/spawn", body)
        assert status == 400
        assert answer["error"]["type"] == "invalid_request"
        assert answer["error"]["details"]["field"] == field


@plain
async def test_unknown_ids_are_not_found(deployment: Deployment) -> None:
    unknown = "agent-0000000000000000"
    for method, path in (
        ("GET", f"/v1/agents/get?agent_id={unknown}"),
        ("DELETE", f"/v1/agents/delete?agent_id={unknown}"),
        ("GET", f"/agents/{unknown}/health"),
        ("GET", f"/v1/agent/session/{new_session_id()}"),
        ("DELETE", f"/v1/agent/session/{new_session_id()}"),
        ("POST", f"/v1/agent/session/{new_session_id()}/interrupt"),
        ("GET", f"/agents/{unknown}/internal/enrol"),
        ("GET", "/nothing"),
    ):
        status, answer = await deployment.call(method, path)
        assert status == 404, (method, path, answer)
        assert answer["error"]["type"] == "not_found"


async def test_consecutive_turns_in_the_pool_use_one_session(pooled: Deployment) -> None:
    status, first = await pooled.chat("one", tools=["Read", "Bash"], temperature=0.5)
    assert status == 200, first
    session_id = first["session_id"]
    agent = pooled.agents.running[first["agent_id"]]
    placed = agent.chats[0]
    assert placed["session_id"] == session_id
    assert placed["placement"] == {
        "session_id": session_id,
        "generation": 1,
        "turn": 1,
        "timeout": 300.0,
        "options": {"model": "claude-test", "tools": ["Read", "Bash"]},
    }
    async with pooled.database.read() as connection:
        row = await sessions.get_session(connection, session_id)
    assert row is not None
    assert (row.turn_max_tokens, row.turn_temperature, row.turn_holder) == (77, 0.5, None)

    status, second = await pooled.chat("two", session_id=session_id, tools=["Bash", "Read"], max_tokens=5)
    assert (status, second["turn"], second["agent_id"]) == (200, 2, agent.agent_id)
    assert agent.chats[1]["placement"]["options"] == {"model": "claude-test", "tools": ["Read", "Bash"]}

    status, view = await pooled.call("GET", f"/v1/agent/session/{session_id}")
    assert (view["turns"], view["running"], view["agent_id"]) == (2, False, agent.agent_id)
    listed = (await pooled.call("GET", "/v1/agent/sessions", user_id="ada"))[1]
    assert [entry["session_id"] for entry in listed["sessions"]] == [session_id]


async def test_sessions_are_listed_in_pages(pooled: Deployment) -> None:
    made = [(await pooled.chat(user_id=f"user-{number}"))[1]["session_id"] for number in range(4)]
    async with pooled.database.write() as connection:  # ties: sessions that were used at the same time
        same = update(tables.sessions).where(tables.sessions.c.session_id.in_(made[:2]))
        await connection.execute(same.values(last_used_at=1.5))
    whole = (await pooled.call("GET", "/v1/agent/sessions"))[1]
    assert (whole["count"], whole["next"]) == (4, None)
    for limit in (1, 2, 4):
        page = (await pooled.call("GET", "/v1/agent/sessions", limit=str(limit)))[1]
        seen = [entry["session_id"] for entry in page["sessions"]]
        while page["next"] is not None:
            asked = {"limit": str(limit), "after": page["next"]}
            page = (await pooled.call("GET", "/v1/agent/sessions", **asked))[1]
            seen += [entry["session_id"] for entry in page["sessions"]]
        assert seen == [entry["session_id"] for entry in whole["sessions"]]
    for wrong in ("nan_x", "x", f"1e_{made[0]}"):
        status, answer = await pooled.call("GET", "/v1/agent/sessions", after=wrong)
        assert (status, answer["error"]["details"]["field"]) == (400, "after")


async def test_frozen_options_cannot_change(pooled: Deployment) -> None:
    _, first = await pooled.chat(tools=["Read"])
    for said, field in (({"tools": ["Bash"]}, "tools"), ({"system_prompt": "x"}, "system_prompt")):
        status, answer = await pooled.chat(session_id=first["session_id"], **said)
        assert (status, answer["error"]["type"]) == (409, "conflict")
        assert answer["error"]["details"]["field"] == field
    assert (await pooled.chat(session_id=first["session_id"], model="claude-test"))[0] == 200


async def test_a_session_is_accessible_to_its_user_only(pooled: Deployment) -> None:
    _, first = await pooled.chat()
    session_id = first["session_id"]
    foreign = {"user_id": "bob", "prompt": "hi", "session_id": session_id}
    assert (await pooled.call("POST", "/v1/agent/chat", foreign))[0] == 404
    for method, path in (
        ("GET", f"/v1/agent/session/{session_id}"),
        ("DELETE", f"/v1/agent/session/{session_id}"),
        ("POST", f"/v1/agent/session/{session_id}/interrupt"),
    ):
        assert (await pooled.call(method, path, user_id="bob"))[0] == 404
    other = next(agent_id for agent_id in pooled.agents.running if agent_id != first["agent_id"])
    assert (await pooled.call("GET", f"/agents/{other}/v1/agent/session/{session_id}"))[0] == 404
    assert (await pooled.call("GET", f"/agents/{first['agent_id']}/v1/agent/session/{session_id}"))[0] == 200


async def test_a_full_pool_is_reported_with_numbers(pooled: Deployment) -> None:
    both_refused = asyncio.Event()

    async def answer(agent: StandInAgent, body: dict[str, Any]) -> web.Response:
        await both_refused.wait()  # a session with a running turn keeps its place; an idle one's would be reclaimed
        return web.json_response(completed(agent, body))

    for agent in pooled.agents.running.values():
        agent.answer = lambda _, body, agent=agent: answer(agent, body)
    waiting = {asyncio.create_task(pooled.chat()) for _ in range(6)}
    answers: list[tuple[int, Any]] = []
    try:
        async with asyncio.timeout(60):
            while len(answers) < 2:
                answered, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                answers += [task.result() for task in answered]
    finally:
        both_refused.set()
        answers += await asyncio.gather(*waiting)
    assert [status for status, _ in answers] == [503, 503, 200, 200, 200, 200]
    refused = next(body for status, body in answers if status == 503)["error"]
    assert (refused["type"], refused["retryable"]) == ("at_capacity", True)
    assert refused["details"] == {"agents_running": 2, "agents_starting": 0, "capacity": 4, "sessions": 4}
    placed = [body["agent_id"] for status, body in answers if status == 200]
    assert {placed.count(agent_id) for agent_id in placed} == {2}
    done = next(body for status, body in answers if status == 200)
    status, deleted = await pooled.call("DELETE", f"/v1/agent/session/{done['session_id']}")
    assert (status, deleted) == (200, {"session_id": done["session_id"], "deleted": True, "notices": []})
    assert pooled.agents.running[done["agent_id"]].deleted == [done["session_id"]]
    assert (await pooled.chat())[0] == 200


@plain
async def test_a_dedicated_agent_serves_only_its_owner(deployment: Deployment) -> None:
    agent = await spawn(deployment, system_prompt="be brief", timeout=7)
    path = f"/agents/{agent['agent_id']}/v1/agent/chat"
    status, answer = await deployment.call("POST", path, {"user_id": "ada", "prompt": "hi"})
    assert status == 200, answer
    placement = deployment.agents.running[agent["agent_id"]].chats[0]["placement"]
    assert (placement["timeout"], placement["options"]["system_prompt"]) == (7.0, "be brief")
    assert (await deployment.call("POST", path, {"user_id": "bob", "prompt": "hi"}))[0] == 404
    status, answer = await deployment.chat()
    assert (status, answer["error"]["details"]["agents_running"]) == (503, 0)


@plain
async def test_an_agent_receives_none_of_the_clients_headers(pooled: Deployment) -> None:
    headers = {"authorization": "Bearer mine", "x-hypercore-agent": "x", "cookie": "a=b", "x-request-id": "req_mine"}
    status, answer = await pooled.call("POST", "/v1/agent/chat", {"user_id": "ada", "prompt": "hi"}, headers=headers)
    agent = pooled.agents.running[answer["agent_id"]]
    seen = agent.headers[0]
    assert status == 200
    assert seen["authorization"] == f"Bearer {agent.bearer}"
    assert seen["x-request-id"] == "req_mine"
    assert not {"cookie", "x-hypercore-agent"} & set(seen)


async def test_a_stream_is_relayed_unbuffered_and_ends_its_turn_first(pooled: Deployment) -> None:
    proceed = asyncio.Event()

    async def stream(agent: StandInAgent, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "set-cookie": "a=b"})
        await response.prepare(request)
        await response.write(frame("session", {"session_id": body["session_id"]}))
        await proceed.wait()
        await response.write(frame("result", completed(agent, body)))
        await response.write_eof()
        return response

    for agent in pooled.agents.running.values():
        agent.answer = lambda request, body, agent=agent: stream(agent, request, body)
    body = {"user_id": "ada", "prompt": "hi", "stream": True}
    async with pooled.http.post(f"{pooled.url}/v1/agent/chat", json=body) as answer:
        assert answer.content_type == "text/event-stream"
        assert "set-cookie" not in answer.headers
        first = await answer.content.readuntil(b"\n\n")
        session_id = json.loads(first.partition(b"data: ")[2])["session_id"]
        view = (await pooled.call("GET", f"/v1/agent/session/{session_id}"))[1]
        assert view["running"] is True
        status, conflict = await pooled.chat(session_id=session_id)
        assert (status, conflict["error"]["type"]) == (409, "conflict")
        queued = asyncio.create_task(pooled.chat(session_id=session_id, stream=False, when_busy="queue"))
        status, stopped = await pooled.call("POST", f"/v1/agent/session/{session_id}/interrupt")
        assert (status, stopped["interrupted"]) == (200, True)
        assert not queued.done()
        proceed.set()
        assert b"event: result" in await answer.content.readuntil(b"\n\n")
        assert (await queued)[0] == 200
        assert (await pooled.chat(session_id=session_id, stream=False))[0] == 200


async def waiting_are(deployment: Deployment, count: int) -> bool:
    async with deployment.database.read() as connection:
        return len((await connection.execute(select(tables.waiting_turns))).all()) == count


@pytest.mark.parametrize("workers", [2], indirect=True)
async def test_queued_turns_of_all_workers_run_in_order_of_arrival(pooled: Deployment) -> None:
    _, first = await pooled.chat()
    session = {"session_id": first["session_id"], "when_busy": "queue"}
    agent = pooled.agents.running[first["agent_id"]]
    proceed, said = asyncio.Event(), []

    async def answer(_: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        said.append(body["prompt"])
        await proceed.wait()
        return web.json_response(completed(agent, body))

    agent.answer = answer
    async with pooled.database.write() as connection:  # the ticket of a dead process, which does not count
        await turn_queue.join(connection, first["session_id"], "dead", now=time.time())
    asked = [asyncio.create_task(pooled.chat("0", **session))]
    await until(lambda: said)
    for number in range(1, 6):  # consecutive calls go to different workers
        asked.append(asyncio.create_task(pooled.chat(str(number), **session)))
        await until(partial(waiting_are, pooled, number + 1))
    left = asked.pop(3)
    left.cancel()
    await until(partial(waiting_are, pooled, 5))
    proceed.set()
    answers = await asyncio.gather(*asked)
    assert [(status, answer["content"]) for status, answer in answers] == [(200, f"you said {n}") for n in "01245"]
    assert said == ["0", "1", "2", "4", "5"]
    assert [answer["turn"] for _, answer in answers] == [2, 3, 4, 5, 6]
    assert await waiting_are(pooled, 1)


async def test_usage_is_the_sum_of_the_ledger(pooled: Deployment) -> None:
    entry = ledger.LedgerEntry(86400.0, "ada", "agent-x", "s", 1, "claude", 10, 5, 2, 1, 1_500_000, "complete")
    async with pooled.database.write() as connection:
        await ledger.add_entry(connection, entry)
    status, report = await pooled.call("GET", "/v1/usage", user_id="ada", since="1970-01-01", until="1970-01-02")
    assert status == 200
    assert report["total"] == {"input_tokens": 13, "output_tokens": 5, "total_tokens": 18, "cost_usd": 1.5}
    assert (await pooled.call("GET", "/v1/usage", user_id="bob"))[1]["rows"] == []
    assert (await pooled.call("GET", "/v1/usage", since="yesterday"))[0] == 400


@plain
async def test_health_names_each_dependency(pooled: Deployment) -> None:
    status, health = await pooled.call("GET", "/health")
    assert status == 503
    assert health["status"] == "failing"
    assert health["dependencies"]["gateway"]["status"] == "failing"
    assert "reached" in health["dependencies"]["gateway"]["error"]
    for name in ("store", "backend"):
        assert health["dependencies"][name]["status"] == "ok"
        assert health["dependencies"][name]["latency_ms"] >= 0
    assert (await pooled.call("GET", "/ready"))[0] == 200


def value_of(name: str, page: str) -> float:
    found = re.search(rf"^{name} (\S+)$", page, re.MULTILINE)
    assert found, name
    return float(found[1])


@plain  # shared by processes: test_manager_workers.py
async def test_all_metrics_exist_at_start(pooled: Deployment) -> None:
    _, page = await pooled.call("GET", "/metrics")
    for line in (
        "hypercore_agent_active_count 2.0",
        'hypercore_agent_spawn_total{status="success"} 2.0',
        'hypercore_agent_spawn_total{status="failure"} 0.0',
        "hypercore_pool_desired 2.0",
        'hypercore_manager_requests_total{route="/v1/agent/chat",status="server_error"} 0.0',
        'hypercore_manager_turns_total{status="ok"} 0.0',
        "hypercore_host_load 0.5",
        "hypercore_host_sandboxes 2.0",
        "hypercore_host_disk_given_bytes 0.0",
    ):
        assert line in page, line
    assert "hypercore_agent_spawn_duration_seconds_count 2.0" in page
    host = (await pooled.stats())["host"]
    for what, given, unit in (("cores", host["cores_used"], 1), ("memory", host["memory_used_mb"], 1 << 20)):
        assert given > 0
        name = f"hypercore_host_{what}_given{'_bytes' if unit > 1 else ''}"
        assert value_of(name, page) == given * unit
    for name, value in (("memory_for_agents", 1 << 44), ("memory_free", 1 << 43), ("disk_free", 1 << 42)):
        assert value_of(f"hypercore_host_{name}_bytes", page) == value
    assert host.get("memory_charged_mb") is None
    assert value_of("hypercore_host_memory_charged_bytes", page) == 0
    one, two = sorted(pooled.host.sandboxes)
    pooled.host.charged_mb = {one: 300, two: 20, "templates": 7}
    host = (await pooled.stats())["host"]
    assert host["memory_charged_mb"] == 327
    assert host["agents_memory"][one]["charged_mb"] == 300
    assert host["agents_memory"][one]["given_mb"] == host["memory_used_mb"] / 2
    assert host["templates_memory"] == {"given_mb": 100, "charged_mb": 7}
    await pooled.call("GET", "/nothing")
    _, page = await pooled.call("GET", "/metrics")
    assert 'hypercore_manager_errors_total{error_type="not_found"} 1.0' in page
    assert value_of("hypercore_host_memory_charged_bytes", page) == 327 << 20


@plain
async def test_the_api_docs_load_nothing_from_the_internet(pooled: Deployment) -> None:
    status, page = await pooled.call("GET", "/docs")
    assert status == 200
    assert "https://" not in page
    status, document = await pooled.call("GET", "/openapi.json")
    assert status == 200
    assert "/agents/{agent_id}/v1/agent/chat" in document["paths"]


@plain
async def test_long_prompts_are_accepted_up_to_the_limit(pooled: Deployment) -> None:
    """Other limits of bodies: test_bad_input.py."""

    async def body(size: int) -> AsyncIterator[bytes]:
        yield b'{"user_id": "ada", "prompt": "'
        for start in range(0, size, 65536):
            yield b"x" * min(65536, size - start)
        yield b'"}'

    for size, status, kind in (
        (1_900_000, 200, None), (2_000_001, 400, "invalid_request"), (17 * 1024 * 1024, 413, "payload_too_large"),
    ):  # fmt: skip
        headers = {"content-type": "application/json"} | ({"expect": "100-continue"} if status == 413 else {})
        async with pooled.http.post(f"{pooled.url}/v1/agent/chat", data=body(size), headers=headers) as answer:
            found = await answer.json()
        assert answer.status == status
        assert found.get("error", {}).get("type") == kind
