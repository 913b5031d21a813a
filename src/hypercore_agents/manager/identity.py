"""The identity of this manager process: a lease in the store. The turns that it runs are its own while the lease lasts.

The turns of a process that dies are released when its lease expires (15 s); a process that ends normally releases them
at once.
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
        """Take or renew the lease, and delete expired leases of other processes."""
        now = self._clock()
        async with self._database.write() as connection:
            await leases.take_lease(
                connection, _PREFIX + self.manager_id, self.manager_id, now=now, seconds=LEASE_SECONDS
            )
            await leases.forget_expired(connection, _PREFIX, before=now - _FORGET_AFTER)

    async def release(self) -> None:
        """Release the lease, and with it the turns that this process holds."""
        async with self._database.write() as connection:
            await leases.release(connection, _PREFIX + self.manager_id, self.manager_id)
