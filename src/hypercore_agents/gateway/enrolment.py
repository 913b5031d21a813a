"""Enrolment: an agent exchanges the one-use secret of its start for its first credentials.

Invariants: only the digest of a secret is stored; the first public key that presents it wins, and may repeat the
request for `REPEAT_SECONDS` (in case the answer was lost) and receives the same bearer; every other request is rejected
with one and the same message, counted and logged with its reason. The answer is sealed to the public key, so it is
useless to anyone else.

The look-up key is the SHA-256 of 256 random bits, so its timing reveals nothing and it cannot be guessed. The number of
concurrent attempts is limited, not their number per address: agents share addresses with tools, so a limit per address
would let a tool lock agents out. An unknown secret costs one read and no write.
"""

import asyncio
import hmac
import time
from typing import Literal

import structlog

from hypercore_agents.api.errors import Unauthenticated, Unavailable
from hypercore_agents.api.internal import AgentConfiguration, EnrolmentGrant, EnrolRequest, EnrolResponse
from hypercore_agents.gateway.credentials import Tokens
from hypercore_agents.observability.metrics import GatewayMetrics
from hypercore_agents.security.bearers import digest, new_bearer
from hypercore_agents.security.enrolment import seal_grant
from hypercore_agents.security.sealing import Sealer
from hypercore_agents.store.agents import LIVE_STATES, AgentRow, get_agent, set_bearer
from hypercore_agents.store.database import Database
from hypercore_agents.store.enrolments import EnrolmentRow, get_enrolment, use_enrolment
from hypercore_agents.store.keys import agent_owner

REPEAT_SECONDS = 60.0
_AT_ONE_TIME = 32
_log = structlog.get_logger(__name__)
Refusal = Literal["unknown", "foreign", "expired", "replayed", "not_starting"]


class Enrolment:
    """Serves `POST /internal/enrol`."""

    def __init__(self, database: Database, sealer: Sealer, tokens: Tokens, metrics: GatewayMetrics) -> None:
        self._database = database
        self._sealer = sealer
        self._tokens = tokens
        self._metrics = metrics
        self._running = asyncio.Semaphore(_AT_ONE_TIME)

    async def enrol(self, request: EnrolRequest) -> EnrolResponse:
        """Return the agent's grant, sealed to its key.

        Raises Unauthenticated for a secret that is not valid, Unavailable for too many concurrent requests.
        """
        if self._running.locked():
            raise Unavailable("too many concurrent enrolments", retry_after=1)
        async with self._running:
            secret_digest = digest(request.secret)
            async with self._database.read() as connection:
                found = await get_enrolment(connection, secret_digest)
            if found is None:
                raise self._refused(request, "unknown")
            async with self._database.write() as connection:
                now = time.time()
                found = await get_enrolment(connection, secret_digest)
                agent = await get_agent(connection, request.agent_id)
                if (refusal := _refusal(found, agent, request, now)) is not None:
                    raise self._refused(request, refusal)
                assert found is not None
                assert agent is not None
                owner = agent_owner(agent.agent_id)
                repeated = found.used_at is not None
                if repeated:
                    assert agent.bearer_sealed is not None
                    bearer = self._sealer.open(agent.bearer_sealed, owner)
                else:
                    bearer = new_bearer()
                    sealed = self._sealer.seal(bearer, owner)
                    if not await use_enrolment(connection, secret_digest, request.public_key, now=now):
                        raise self._refused(request, "replayed")
                    if not await set_bearer(connection, agent.agent_id, sealed, now=now):
                        raise self._refused(request, "not_starting")
                response = self._grant(agent, found, bearer, request.public_key)
        self._metrics.enrolments.labels("repeated" if repeated else "success").inc()
        _log.info("enrolment.granted", agent_id=agent.agent_id, repeated=repeated)
        return response

    def _grant(self, agent: AgentRow, found: EnrolmentRow, bearer: str, public_key: str) -> EnrolResponse:
        token, expires_at = self._tokens.for_agent(agent.agent_id)
        configuration = (
            AgentConfiguration.model_validate(found.configuration)
            if found.configuration is not None
            else AgentConfiguration(
                max_concurrent=agent.capacity,
                tools=False,
                tools_reason="the manager did not confirm that tools are safe",
            )
        )
        grant = EnrolmentGrant(agent_token=token, expires_at=expires_at, bearer=bearer, configuration=configuration)
        return EnrolResponse(sealed=seal_grant(grant, public_key, agent.agent_id))

    def _refused(self, request: EnrolRequest, reason: Refusal) -> Unauthenticated:
        self._metrics.enrolments.labels(reason).inc()
        _log.warning("enrolment.refused", agent_id=request.agent_id, reason=reason)
        return Unauthenticated("this enrolment secret is not valid, or no longer valid")


def _refusal(found: EnrolmentRow | None, agent: AgentRow | None, request: EnrolRequest, now: float) -> Refusal | None:
    if found is None:
        return "unknown"
    if agent is None or not hmac.compare_digest(found.agent_id, request.agent_id):
        return "foreign"
    if found.used_at is None:
        return "expired" if now >= found.expires_at else None
    if found.public_key != request.public_key or now >= found.used_at + REPEAT_SECONDS or agent.bearer_sealed is None:
        return "replayed"
    return None if agent.state in LIVE_STATES else "not_starting"
