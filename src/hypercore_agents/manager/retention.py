"""Deletes old rows: ended agents, ended sessions, the ledger. Run by the leader.

Transcripts, workspaces and event logs of ended sessions are deleted at once, by `sessions/purge.py`. Heartbeats of
ended agents and old rate counts are deleted here too, without a setting.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import structlog

from hypercore_agents.store import retention
from hypercore_agents.store.database import Connection, Database

_log = structlog.get_logger(__name__)
INTERVAL_SECONDS = 300.0
_BATCH, _MAX_ROWS = 500, 20_000
_RATES_SECONDS = 86400.0


@dataclass(frozen=True)
class RetentionPeriods:
    """How long each kind of row is retained, in seconds. 0: unlimited."""

    agents: float
    sessions: float
    ledger: float


class Retention:
    """Deletes rows older than `periods` allows. `clock` returns Unix seconds."""

    def __init__(
        self, database: Database, periods: RetentionPeriods, *, leads: Callable[[], bool], clock: Callable[[], float]
    ) -> None:
        self._database = database
        self._periods = periods
        self._leads = leads
        self._clock = clock

    async def run_once(self) -> None:
        """Delete expired rows in many short transactions, if this process leads."""
        if not self._leads():
            return
        now, periods = self._clock(), self._periods
        await self._delete_all("heartbeats", partial(retention.delete_heartbeats, limit=_BATCH))
        for name, seconds, delete in (
            ("sessions", periods.sessions, retention.delete_sessions),  # before the agents that they name
            ("agents", periods.agents, retention.delete_agents),
            ("ledger", periods.ledger, retention.delete_ledger),
        ):
            if seconds:
                await self._delete_all(name, partial(delete, before=now - seconds, limit=_BATCH))
        async with self._database.write() as connection:
            await retention.delete_rates(connection, before=now - _RATES_SECONDS)

    async def _delete_all(self, name: str, delete: Callable[[Connection], Awaitable[int]]) -> None:
        total = 0
        while self._leads() and total < _MAX_ROWS:
            async with self._database.write() as connection:
                deleted = await delete(connection)
            total += deleted
            if deleted < _BATCH:
                break
        if total:
            _log.info("retention.deleted", what=name, count=total)
