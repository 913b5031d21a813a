"""Enrolment, token renewal, session tokens and usage over real HTTP, on SQLite and PostgreSQL."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hypercore_agents.api.agents import AgentState
from hypercore_agents.api.internal import EnrolmentGrant
from hypercore_agents.security.bearers import digest, new_bearer
from hypercore_agents.security.enrolment import EnrolmentKey
from hypercore_agents.store.agents import change_agent, get_agent
from hypercore_agents.store.heartbeats import get_heartbeat, pool_heartbeats
from hypercore_agents.store.keys import agent_owner
from hypercore_agents.store.ledger import LedgerEntry, add_entry
from hypercore_agents.store.tables import enrolments
from support.gateway_server import DEDICATED, POOL, STARTING, Site, gateway_site


@pytest_asyncio.fixture
async def site(tmp_path: Path, store_url: str) -> AsyncIterator[Site]:
    async with gateway_site(tmp_path, store_url, "http://127.0.0.1:9") as site:
        yield site


async def call(
    site: Site, path: str, body: Any = None, *, token: str | None = None, method: str = "POST"
) -> tuple[int, dict[str, Any]]:
    headers = {"authorization": f"Bearer {token}"} if token is not None else {}
    async with site.http.request(method, site.url + path, json=body, headers=headers) as answer:
        return answer.status, await answer.json()


async def enrol(
    site: Site, secret: str, key: EnrolmentKey, agent_id: str = STARTING
) -> tuple[int, EnrolmentGrant | None]:
    status, body = await call(
        site, "/internal/enrol", {"agent_id": agent_id, "secret": secret, "public_key": key.public()}
    )
    return status, key.open(body["sealed"], agent_id) if status == 200 else None


async def age_enrolment(site: Site, **columns: float) -> None:
    async with site.database.write() as connection:
        await connection.execute(enrolments.update().values(**columns))


async def test_an_enrolled_agent_can_use_its_credentials(site: Site) -> None:
    secret = await site.allow_enrolment(configuration={"max_concurrent": 7, "tools": True})
    status, grant = await enrol(site, secret, EnrolmentKey())
    assert status == 200
    assert grant is not None
    assert (grant.configuration.max_concurrent, grant.configuration.tools) == (7, True)
    assert grant.expires_at > time.time()
    async with site.database.read() as connection:
        agent = await get_agent(connection, STARTING)
    assert agent is not None
    assert agent.bearer_sealed is not None
    assert site.sealer.open(agent.bearer_sealed, agent_owner(STARTING)) == grant.bearer
    status, renewed = await call(site, "/internal/agent-token", token=grant.agent_token)
    assert status == 200
    assert site.tokens.agent(renewed["agent_token"]).agent_id == STARTING
    assert 'hypercore_gateway_enrolments_total{status="success"} 1.0' in await site.metrics()


async def test_an_agent_without_a_configuration_has_no_tools(site: Site) -> None:
    _, grant = await enrol(site, await site.allow_enrolment(), EnrolmentKey())
    assert grant is not None
    assert (grant.configuration.max_concurrent, grant.configuration.tools) == (100, False)
    assert grant.configuration.tools_reason


async def test_the_same_key_may_repeat_an_enrolment(site: Site) -> None:
    secret, key = await site.allow_enrolment(), EnrolmentKey()
    _, first = await enrol(site, secret, key)
    status, second = await enrol(site, secret, key)
    assert status == 200
    assert first is not None
    assert second is not None
    assert first.bearer == second.bearer
    await age_enrolment(site, used_at=time.time() - 61)
    assert (await enrol(site, secret, key))[0] == 401
    metrics = await site.metrics()
    assert 'enrolments_total{status="repeated"} 1.0' in metrics
    assert 'enrolments_total{status="replayed"} 1.0' in metrics


async def test_invalid_enrolment_secrets_are_rejected(site: Site) -> None:
    secret = await site.allow_enrolment()
    assert (await enrol(site, secret, EnrolmentKey(), POOL))[0] == 401
    assert (await enrol(site, secret, EnrolmentKey()))[0] == 200
    assert (await enrol(site, secret, EnrolmentKey()))[0] == 401
    expired = await site.allow_enrolment(expires_in=-1)
    assert (await enrol(site, expired, EnrolmentKey()))[0] == 401
    assert (await enrol(site, new_bearer(), EnrolmentKey()))[0] == 401
    metrics = await site.metrics()
    for reason in ("foreign", "replayed", "expired", "unknown"):
        assert f'enrolments_total{{status="{reason}"}} 1.0' in metrics, reason


async def test_all_rejections_have_the_same_message(site: Site) -> None:
    used, key = await site.allow_enrolment(), EnrolmentKey()
    await enrol(site, used, key)
    messages = set()
    for secret, agent_id in ((used, STARTING), (used, POOL), (new_bearer(), STARTING)):
        body = {"agent_id": agent_id, "secret": secret, "public_key": EnrolmentKey().public()}
        status, answer = await call(site, "/internal/enrol", body)
        assert status == 401
        messages.add(answer["error"]["message"])
        assert secret not in str(answer)
    assert len(messages) == 1


async def test_only_a_starting_agent_can_enrol(site: Site) -> None:
    secret = await site.allow_enrolment(POOL)  # already running
    assert (await enrol(site, secret, EnrolmentKey(), POOL))[0] == 401
    async with site.database.read() as connection:
        row = (await connection.execute(enrolments.select())).one()
    assert row.used_at is None
    assert row.secret_digest == digest(secret)


async def test_one_of_two_concurrent_keys_wins(site: Site) -> None:
    secret = await site.allow_enrolment()
    results = await asyncio.gather(*(enrol(site, secret, EnrolmentKey()) for _ in range(8)))
    assert sorted(status for status, _ in results) == [200, *[401] * 7]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"public_key": "AAAA"}, "public_key"),
        ({"public_key": "A" * 43 + "="}, "public_key"),
        ({"secret": "short"}, "secret"),
        ({"agent_id": "agent-1"}, "agent_id"),
        ({"more": 1}, "more"),
    ],
)
async def test_a_malformed_enrolment_does_not_use_the_secret(site: Site, change: dict[str, Any], field: str) -> None:
    secret, key = await site.allow_enrolment(), EnrolmentKey()
    body = {"agent_id": STARTING, "secret": secret, "public_key": key.public(), **change}
    status, answer = await call(site, "/internal/enrol", body)
    assert (status, answer["error"]["details"]["field"]) == (400, field)
    assert (await enrol(site, secret, key))[0] == 200


async def test_internal_routes_accept_agent_tokens_only(site: Site) -> None:
    session_id = await site.session()
    for path, body, method in (
        ("/internal/agent-token", None, "POST"),
        ("/internal/session-tokens", {"session_id": session_id, "generation": 1}, "POST"),
        (f"/internal/sessions/{session_id}/turns/1/usage?generation=1", None, "GET"),
    ):
        for token in (None, "", site.token(session_id), new_bearer(), site.agent_token()[:-3] + "abc"):
            status, answer = await call(site, path, body, token=token, method=method)
            assert (status, answer["error"]["type"]) == (401, "unauthenticated"), path
        assert (await call(site, path, body, token=site.agent_token(), method=method))[0] == 200


BEAT = {
    "ready": True,
    "sessions": 3,
    "live": 2,
    "running": 1,
    "waiting": 4,
    "memory_mb": 700,
    "memory_limit_mb": 1000,
    "cpu": 0.5,
    "queue_wait_seconds": 1.5,
}


async def test_a_heartbeat_replaces_the_previous_one(site: Site) -> None:
    token, _ = site.tokens.for_agent(POOL)
    before = time.time()
    status, taken = await call(site, "/internal/heartbeat", BEAT, token=token)
    assert status == 200
    assert before <= taken["at"] <= time.time()
    assert (await call(site, "/internal/heartbeat", {**BEAT, "waiting": 0, "cpu": None}, token=token))[0] == 200
    async with site.database.read() as connection:
        row = await get_heartbeat(connection, POOL)
        assert await pool_heartbeats(connection, since=before) == [row]
        assert await pool_heartbeats(connection, since=time.time() + 1) == []
    assert row is not None
    assert (row.ready, row.live, row.waiting, row.cpu, row.queue_wait_seconds) == (True, 2, 0, None, 1.5)


@pytest.mark.parametrize("change", [{"cpu": 1.5}, {"sessions": -1}, {"memory_limit_mb": 0}, {"agent_id": DEDICATED}])
async def test_an_absurd_heartbeat_is_rejected(site: Site, change: dict[str, Any]) -> None:
    token, _ = site.tokens.for_agent(POOL)
    status, body = await call(site, "/internal/heartbeat", {**BEAT, **change}, token=token)
    assert (status, body["error"]["details"]["field"]) == (400, next(iter(change)))


async def test_heartbeats_of_ended_agents_are_rejected(site: Site) -> None:
    token, _ = site.tokens.for_agent(POOL)
    async with site.database.write() as connection:
        agent = await get_agent(connection, POOL)
        assert agent is not None
        await change_agent(connection, POOL, agent.version, now=time.time(), state=AgentState.STOPPED)
    assert (await call(site, "/internal/heartbeat", BEAT, token=token))[0] == 403


async def test_an_ended_agent_cannot_renew_its_token(site: Site) -> None:
    async with site.database.write() as connection:
        assert await change_agent(connection, POOL, 0, now=time.time(), state=AgentState.STOPPED)
    status, answer = await call(site, "/internal/agent-token", token=site.agent_token())
    assert (status, answer["error"]["type"]) == (403, "forbidden")


async def test_session_tokens_need_the_current_placement(site: Site) -> None:
    mine, ended, others = await site.session(), await site.session(), await site.session(DEDICATED, user_id="eve")
    await site.end(ended)

    async def ask(session_id: str, generation: int) -> tuple[int, dict[str, Any]]:
        body = {"session_id": session_id, "generation": generation}
        return await call(site, "/internal/session-tokens", body, token=site.agent_token())

    status, answer = await ask(mine, 1)
    assert status == 200
    claims = site.tokens.session(answer["session_token"])
    assert (claims.agent_id, claims.session_id, claims.generation) == (POOL, mine, 1)
    assert answer["expires_at"] == claims.expires_at
    status, answer = await ask(mine, 2)
    assert (status, answer["error"]["details"]) == (409, {"generation": 1})
    for unknown in (ended, others, "00000000-0000-0000-0000-000000000000"):
        assert (await ask(unknown, 1))[0] == 404
    assert (await ask("nonsense", 1))[0] == 400
    assert (await ask(mine, 0))[0] == 400


async def test_a_turns_usage_is_the_sum_of_the_ledger(site: Site) -> None:
    session_id = await site.session()
    for turn, produced in ((1, 5), (2, 7), (2, 8)):
        async with site.database.write() as connection:
            await add_entry(
                connection,
                LedgerEntry(time.time(), "ada", POOL, session_id, turn, "m", 10, produced, 1, 2, 100, "complete"),
            )

    async def usage(turn: int, generation: int = 1, agent: str = POOL) -> tuple[int, dict[str, Any]]:
        path = f"/internal/sessions/{session_id}/turns/{turn}/usage?generation={generation}"
        return await call(site, path, token=site.agent_token(agent), method="GET")

    status, answer = await usage(2)
    assert status == 200
    assert answer == {"input_tokens": 26, "output_tokens": 15, "total_tokens": 41, "cost_usd": 0.0002}
    assert (await usage(3))[1]["total_tokens"] == 0
    assert (await usage(2, generation=2))[0] == 409
    assert (await usage(2, agent=DEDICATED))[0] == 404
    assert (await usage(0))[0] == 400


async def test_internal_rejections_have_the_error_shape(site: Site) -> None:
    token = site.agent_token()
    assert (await call(site, "/internal/nothing", token=token))[1]["error"]["type"] == "not_found"
    assert (await call(site, "/internal/agent-token", token=token, method="GET"))[0] == 405
    assert (await call(site, "/internal/session-tokens", {"session_id": "x" * 100_000}, token=token))[0] == 413


async def test_sandboxes_cannot_reach_operator_routes(site: Site) -> None:
    for path in ("/health", "/metrics", "/docs", "/openapi.json"):
        assert (await call(site, path, token=site.agent_token(), method="GET"))[0] == 404


async def test_health_names_the_failed_dependency(site: Site) -> None:
    async with site.http.get(f"{site.operator_url}/health") as answer:
        assert answer.status == 200
        body = await answer.json()
    assert set(body.pop("latency_ms")) == {"store", "key_ring", "blobs", "claude_api"}
    assert body.pop("errors") == {"claude_api": "the Claude API could not be reached"}
    assert body == {
        "status": "degraded",
        "dependencies": {"store": "ok", "key_ring": "ok", "blobs": "ok", "claude_api": "unreachable"},
    }
