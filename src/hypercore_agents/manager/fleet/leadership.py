"""Leader election: the manager process that holds the lease reconciles agents. All its writes check the lease's fence.

A leader that hangs and resumes finds its fence stale inside the transaction in which it would have written. Its
successor removes any sandbox that it started in the meantime.
"""

from collections.abc import Callable

import structlog

from hypercore_agents.store import leases
from hypercore_agents.store.database import Connection, Database

LEASE = "reconciler"
LEASE_SECONDS = 10.0
RENEW_SECONDS = 3.0

_log = structlog.get_logger(__name__)


class LeadershipLost(Exception):
    """This process no longer leads; the write that it was about to make is not made."""


class Leadership:
    """One process's part in the election. `clock` returns Unix seconds."""

    def __init__(self, database: Database, holder: str, clock: Callable[[], float]) -> None:
        self._database = database
        self._holder = holder
        self._clock = clock
        self._fence: int | None = None

    @property
    def leads(self) -> bool:
        """Whether this process led when it last checked."""
        return self._fence is not None

    async def renew(self) -> bool:
        """Take or renew the lease; return whether this process has just become the leader."""
        async with self._database.write() as connection:
            fence = await leases.take_lease(connection, LEASE, self._holder, now=self._clock(), seconds=LEASE_SECONDS)
        before, self._fence = self._fence, fence
        if fence == before:
            return False
        _log.info("leadership.taken" if fence is not None else "leadership.lost", fence=fence)
        return fence is not None

    async def guard(self, connection: Connection) -> None:
        """Raise LeadershipLost unless this process still leads; call it in each transaction that changes agents."""
        if self._fence is None or not await leases.holds(connection, LEASE, self._fence, now=self._clock()):
            self._fence = None
            raise LeadershipLost

    async def release(self) -> None:
        """Release the lease, so that another process can lead at once."""
        if self._fence is not None:
            self._fence = None
            async with self._database.write() as connection:
                await leases.release(connection, LEASE, self._holder)
