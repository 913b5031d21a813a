"""HTTP client for the manager's short requests to an agent: readiness checks and operations on a session.

Chats are relayed by `sessions/turns.py`, over the same connection pool.
"""

import asyncio

import structlog
from pydantic import ValidationError

from hypercore_agents.api.chat import SessionDeleted, SessionOpening
from hypercore_agents.api.errors import AgentUnreachable, HypercoreError, parse_error
from hypercore_agents.kit.relay.upstream import RequestLimits, Upstream

_log = structlog.get_logger(__name__)

_RESPONSE_BYTES = 64 * 1024
OPENING_SECONDS = 150.0
"""Maximum time to restore a session's workspace."""


class AgentClient:
    """Sends requests to agents. Only `open_session` raises when an agent fails."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def is_ready(self, address: str, *, seconds: float = 2.0) -> bool:
        """Return whether the agent accepts sessions."""
        return await self._status("GET", f"{address}/ready", seconds) == 200

    async def is_alive(self, address: str, *, seconds: float = 5.0) -> bool:
        """Return whether the agent's server responds at all."""
        return await self._status("GET", f"{address}/health", seconds) is not None

    async def delete_session(self, address: str, bearer: str, session_id: str, *, seconds: float = 10.0) -> list[str]:
        """Delete a session from the agent; return the agent's notices about processes that ended with it."""
        url = f"{address}/v1/agent/session/{session_id}"
        status, body = await self._send("DELETE", url, seconds, [("authorization", f"Bearer {bearer}")])
        if status not in (200, 204, 404):
            _log.warning("agent.session_not_deleted", session_id=session_id, status=status)
        try:
            return SessionDeleted.model_validate_json(body).notices if status == 200 else []
        except ValidationError:
            return []

    async def release_session(self, address: str, bearer: str, session_id: str, *, seconds: float = 10.0) -> bool:
        """Have the agent release an idle session; return whether the agent no longer has it."""
        url = f"{address}/v1/agent/session/{session_id}/release"
        return await self._status("POST", url, seconds, [("authorization", f"Bearer {bearer}")]) in (200, 404)

    async def open_session(
        self, address: str, bearer: str, opening: SessionOpening, *, seconds: float = OPENING_SECONDS
    ) -> None:
        """Have the agent open a session to serve its files. Raises the agent's own error, or AgentUnreachable."""
        url = f"{address}/v1/agent/session/{opening.placement.session_id}/open"
        headers = [("authorization", f"Bearer {bearer}"), ("content-type", "application/json")]
        limits = RequestLimits(connect=5.0, response=seconds, idle=seconds, total=seconds)
        response = await self._upstream.open(
            "POST", url, headers=headers, body=opening.model_dump_json(exclude_none=True).encode(), limits=limits
        )
        try:
            body = await response.read(_RESPONSE_BYTES)
            if response.status != 200:
                raise parse_error(body) or AgentUnreachable(f"the agent responded with status {response.status}")
        finally:
            response.close()

    async def _status(
        self, method: str, url: str, seconds: float, headers: list[tuple[str, str]] | None = None
    ) -> int | None:
        return (await self._send(method, url, seconds, headers))[0]

    async def _send(
        self, method: str, url: str, seconds: float, headers: list[tuple[str, str]] | None = None
    ) -> tuple[int | None, bytes]:
        limits = RequestLimits(connect=seconds, response=seconds, idle=seconds)
        try:
            async with asyncio.timeout(seconds):
                response = await self._upstream.open(method, url, headers=headers or (), limits=limits)
                try:
                    body = await response.read(_RESPONSE_BYTES)
                finally:
                    response.close()
                return response.status, body
        except (HypercoreError, TimeoutError):
            return None, b""
