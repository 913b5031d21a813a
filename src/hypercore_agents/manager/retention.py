"""How long rows are kept that are history: ended agents and sessions, the ledger. The leader deletes older ones.

Only rows go here; transcripts, workspaces and logs of sessions that are over go at once (`sessions/purge.py`). Ended
agents need no heartbeat, and a user's rates matter for two windows: these have no setting.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import structlog

from hypercore_agents.store import retention
from hypercore_agents.store.database import Connection, Database

_log = structlog.get_logger(__name__)
LOOK_SECONDS = 300.0
_AT_ONCE, _MOST = 500, 20_000
_RATES_SECONDS = 86400.0


@dataclass(frozen=True)
class Kept:
    """How long each kind of row is kept, in seconds; 0: for ever."""

    agents: float
    sessions: float
    ledger: float


class Retention:
    """Deletes rows older than `kept` allows. `clock` returns Unix seconds."""

    def __init__(
        self, database: Database, kept: Kept, *, leads: Callable[[], bool], clock: Callable[[], float]
    ) -> None:
        self._database = database
        self._kept = kept
        self._leads = leads
        self._clock = clock

    async def look(self) -> None:
        """Delete what is too old, in many short transactions, if this process leads."""
        if not self._leads():
            return
        now, kept = self._clock(), self._kept
        await self._all("heartbeats", partial(retention.delete_heartbeats, limit=_AT_ONCE))
        for name, seconds, delete in (
            ("sessions", kept.sessions, retention.delete_sessions),  # before the agents that they name
            ("agents", kept.agents, retention.delete_agents),
            ("ledger", kept.ledger, retention.delete_ledger),
        ):
            if seconds:
                await self._all(name, partial(delete, before=now - seconds, limit=_AT_ONCE))
        async with self._database.write() as connection:
            await retention.delete_rates(connection, before=now - _RATES_SECONDS)

    async def _all(self, name: str, delete: Callable[[Connection], Awaitable[int]]) -> None:
        total = 0
        while self._leads() and total < _MOST:
            async with self._database.write() as connection:
                deleted = await delete(connection)
            total += deleted
            if deleted < _AT_ONCE:
                break
        if total:
            _log.info("retention.deleted", what=name, count=total)
