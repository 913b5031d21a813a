"""Rate limits of users' turns and spawns: `RATE_LIMIT_PER_MINUTE` and `RATE_LIMIT_PER_HOUR`.

Requests are counted in the store, in the transaction that begins the turn or inserts the agent. The count is therefore
exact over all workers, and a request that is rejected for another reason does not count.
"""

from collections.abc import Callable

from hypercore_agents.api.errors import RateLimited
from hypercore_agents.store import rates
from hypercore_agents.store.database import Connection, Database
from hypercore_agents.store.rates import Limit


class RateLimits:
    """The rate limits of every user. 0 means no limit. `clock` returns Unix seconds."""

    def __init__(self, database: Database, *, per_minute: int, per_hour: int, clock: Callable[[], float]) -> None:
        named = [(Limit(60, per_minute), "RATE_LIMIT_PER_MINUTE"), (Limit(3600, per_hour), "RATE_LIMIT_PER_HOUR")]
        self._limits = [limit for limit, _ in named if limit.count]
        self._description = ", ".join(
            f"{limit.count} in {limit.seconds} s ({name})" for limit, name in named if limit.count
        )
        self._database = database
        self._clock = clock

    async def take(self, connection: Connection, user_id: str) -> None:
        """Count one request of a user in this write transaction. Raises RateLimited with the time to wait."""
        if not self._limits:
            return
        await self._database.exclude(connection, rates.rate_lock(user_id))
        wait = await rates.take(connection, user_id, self._limits, now=self._clock())
        if wait is not None:
            raise RateLimited(
                f"user {user_id} sends too many requests: at most {self._description}",
                details={"limits": {str(limit.seconds): limit.count for limit in self._limits}},
                retry_after=wait,
            )
