"""Short calls of the manager to an agent's server: is it there, is it ready, forget that session.

Chats do not come this way; they are relayed (`sessions/turns.py`).
"""

import asyncio

import aiohttp
import structlog

_log = structlog.get_logger(__name__)


class AgentClient:
    """Asks agents' servers. Owns its connections; close it when the process ends."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(), connector=aiohttp.TCPConnector(limit=256, limit_per_host=8)
        )

    async def is_ready(self, address: str, *, seconds: float = 2.0) -> bool:
        """Say whether the agent takes sessions."""
        return await self._status("GET", f"{address}/ready", seconds) == 200

    async def is_alive(self, address: str, *, seconds: float = 5.0) -> bool:
        """Say whether the agent's server answers at all."""
        return await self._status("GET", f"{address}/health", seconds) is not None

    async def delete_session(self, address: str, bearer: str, session_id: str, *, seconds: float = 10.0) -> bool:
        """Have the agent forget a session; return whether it says that it has none such any more."""
        url = f"{address}/v1/agent/session/{session_id}"
        status = await self._status("DELETE", url, seconds, {"authorization": f"Bearer {bearer}"})
        if status not in (200, 204, 404):
            _log.warning("agent.session_not_deleted", session_id=session_id, status=status)
            return False
        return True

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def _status(self, method: str, url: str, seconds: float, headers: dict[str, str] | None = None) -> int | None:
        try:
            async with (
                asyncio.timeout(seconds),
                self._session.request(method, url, headers=headers, allow_redirects=False) as answer,
            ):
                return answer.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None
