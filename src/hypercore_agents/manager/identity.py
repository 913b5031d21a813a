"""This manager process, known to the others by a lease: while it lasts, the turns that it runs are its own.

A process that dies frees its turns when its lease is over (15 s); one that ends in order frees them at once.
"""

import secrets
from collections.abc import Callable

from hypercore_agents.store import leases
from hypercore_agents.store.database import Database

LEASE_SECONDS = 15.0
RENEW_SECONDS = 5.0
_PREFIX = "manager:"
_FORGET_AFTER = 3600.0


class ManagerIdentity:
    """The lease of one manager process. `clock` returns Unix seconds."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self.manager_id = f"m-{secrets.token_hex(8)}"
        self._database = database
        self._clock = clock

    async def renew(self) -> None:
        """Take or keep the lease, and clear away those of processes long gone."""
        now = self._clock()
        async with self._database.write() as connection:
            await leases.take_lease(
                connection, _PREFIX + self.manager_id, self.manager_id, now=now, seconds=LEASE_SECONDS
            )
            await leases.forget_expired(connection, _PREFIX, before=now - _FORGET_AFTER)

    async def release(self) -> None:
        """Give the lease up: whatever turn this process held is over."""
        async with self._database.write() as connection:
            await leases.release(connection, _PREFIX + self.manager_id, self.manager_id)
