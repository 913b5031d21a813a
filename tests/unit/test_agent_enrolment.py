"""Enrolment and the client of the gateway's internal routes, against a real server on loopback."""

import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from hypercore_agents.agent.gateway.client import GatewayClient, StalePlacement
from hypercore_agents.agent.gateway.enrolment import EnrolmentFailed, enrol, read_secret
from hypercore_agents.api.errors import Unavailable
from hypercore_agents.api.ids import new_agent_id
from hypercore_agents.api.internal import AgentToken
from hypercore_agents.kit.aio.tasks import Tasks
from support.agent_server import StandInGateway, secret_pipe, some_uuid, stand_in_gateway
from support.ports import free_port
from support.waiting import until


@pytest_asyncio.fixture
async def gateway() -> AsyncIterator[StandInGateway]:
    async with stand_in_gateway() as running:
        yield running


async def test_enrolment_returns_the_grant_and_closes_the_descriptor(gateway: StandInGateway) -> None:
    descriptor = secret_pipe(gateway.secret + "\n")
    grant = await enrol(new_agent_id(), gateway.url, descriptor, timeout=5)
    assert grant.bearer == gateway.bearer
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


async def test_a_lost_response_is_retried_with_the_same_key(gateway: StandInGateway) -> None:
    gateway.lost_enrolment_answers = 2
    grant = await enrol(new_agent_id(), gateway.url, secret_pipe(gateway.secret), timeout=10)
    assert grant.bearer == gateway.bearer
    assert len({request.public_key for request in gateway.enrolments}) == 1
    assert len(gateway.enrolments) == 3


async def test_a_refusal_is_final_and_reveals_no_secret(gateway: StandInGateway) -> None:
    secret = "foreign-" + "x" * 40
    with pytest.raises(EnrolmentFailed, match="refused") as raised:
        await enrol(new_agent_id(), gateway.url, secret_pipe(secret), timeout=5)
    assert secret not in str(raised.value)
    assert len(gateway.enrolments) == 1


async def test_an_unreachable_gateway_fails_enrolment_in_time() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EnrolmentFailed, match=url):
        await enrol(new_agent_id(), url, secret_pipe("s" * 43), timeout=0.3)


async def test_a_malformed_secret_is_rejected_locally(gateway: StandInGateway) -> None:
    with pytest.raises(EnrolmentFailed, match="malformed"):
        await enrol(new_agent_id(), gateway.url, secret_pipe("short"), timeout=5)
    assert gateway.enrolments == []


def test_a_silent_pipe_and_a_bad_descriptor_give_different_errors() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(EnrolmentFailed, match="in time"):
            read_secret(reading, 0.05)
    finally:
        os.close(writing)
    with pytest.raises(EnrolmentFailed, match="ENROLMENT_FD=999"):
        read_secret(999, 1)


async def test_tokens_are_issued_renewed_and_refused(gateway: StandInGateway) -> None:
    gateway.agent_token_seconds = 2
    tasks = Tasks("test")
    client = GatewayClient(gateway.url, gateway._agent_token())
    client.start(tasks)
    try:
        session = some_uuid()
        token = await client.session_token(session, 1)
        assert token.session_token == gateway.session_tokens[0]
        await until(lambda: len(gateway.agent_tokens) > 1, seconds=5)
        assert (await client.usage(session, 1, 1)).cost_usd == 0.25
        gateway.stale.add(session)
        with pytest.raises(StalePlacement):
            await client.session_token(session, 1)
        gateway.agent_tokens.clear()
        with pytest.raises(Unavailable):
            await client.session_token(session, 1)
        await until(lambda: client.refused is not None, seconds=5)
        assert client.refused == "the gateway no longer accepts this agent"
    finally:
        await tasks.close()
        await client.close()


async def test_requests_without_a_gateway_raise_unavailable() -> None:
    client = GatewayClient(f"http://127.0.0.1:{free_port()}", AgentToken(agent_token="t", expires_at=2e9))
    try:
        with pytest.raises(Unavailable):
            await client.usage(some_uuid(), 1, 1)
    finally:
        await client.close()
