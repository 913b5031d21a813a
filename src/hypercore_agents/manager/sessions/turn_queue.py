"""Who waits for a session's next turn: a line per session, in the order in which they came, over all processes.

Whoever waits has a ticket in the store, and the lowest ticket takes the turn, in the transaction that begins it. In
each process only the first of its line asks the store. Who did not want to wait is not let past those who wait in the
same process. A session is one user's, so nobody stands in a line with another user's turns.

A ticket of a process that died counts no more once its lease is over; one that could not be given back, no longer than
anybody may wait. Rejected: a line per process, whose first ones compete: a process whose turn just ended takes the next
one too, so messages that were sent one after another came out of order, and the other process's waited for all of them.
"""

import asyncio
import bisect
import contextlib
from collections.abc import AsyncIterator, Callable

from hypercore_agents.api.errors import Unavailable
from hypercore_agents.store import turn_queue
from hypercore_agents.store.database import Connection, Database

KEPT_SECONDS = 300.0
"""Far longer than anybody waits."""


class Place:
    """One turn's place in a session's line. `first` says whether nobody of this process is before it."""

    def __init__(self, session_id: str, ticket: int, lines: "TurnQueues", first: Callable[[], bool]) -> None:
        self.first = first
        self.taken = False
        self._session_id = session_id
        self._ticket = ticket
        self._lines = lines

    async def is_next(self, connection: Connection) -> bool:
        """Say whether the session's next turn is this one's; ask in the transaction that begins it."""
        return await self._lines.is_next(connection, self._session_id, self._ticket)

    async def leave(self, connection: Connection) -> None:
        """Give the place up, in the transaction that begins the turn."""
        await turn_queue.leave(connection, self._ticket)


class TurnQueues:
    """`holder` is this manager process; `longest` says how many seconds a turn may wait now; `on_moved` is told the
    session whose line has moved up here; `clock` returns Unix seconds."""

    def __init__(
        self,
        database: Database,
        holder: str,
        *,
        longest: Callable[[], float],
        on_moved: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._holder = holder
        self._longest = longest
        self._on_moved = on_moved
        self._clock = clock
        self._lines: dict[str, list[int]] = {}

    def waits(self, session_id: str) -> bool:
        """Say whether anybody waits for a session in this process."""
        return session_id in self._lines

    async def is_next(self, connection: Connection, session_id: str, ticket: int) -> bool:
        """Say whether nobody is before a ticket of ours, in any process."""
        now = self._clock()
        since = now - 2 * self._longest()
        return await turn_queue.is_next(connection, session_id, ticket, self._holder, since=since, now=now)

    @contextlib.asynccontextmanager
    async def join(self, session_id: str) -> AsyncIterator[Place]:
        """Stand in a session's line until the end, or until the place was taken."""
        taking = asyncio.create_task(self._take(session_id), name="lines.take")
        try:
            ticket = await asyncio.shield(taking)
        except asyncio.CancelledError:  # the ticket may be in the store already, or be on its way there
            await asyncio.shield(self._give_back(session_id, taking))
            raise
        line = self._lines[session_id]
        place = Place(session_id, ticket, self, lambda: line[0] == ticket)
        try:
            yield place
        finally:
            if place.taken:
                self._step_out(session_id, ticket)
            else:
                await asyncio.shield(self._give_back(session_id, taking))

    async def _take(self, session_id: str) -> int:
        async with self._database.write() as connection:
            ticket = await turn_queue.join(connection, session_id, self._holder, now=self._clock())
        # Transactions may end in another order than they began.
        bisect.insort(self._lines.setdefault(session_id, []), ticket)
        return ticket

    async def _give_back(self, session_id: str, taking: asyncio.Task[int]) -> None:
        """Leave the line, also one that is only being joined; runs shielded, to its end."""
        with contextlib.suppress(Unavailable):  # then it counts until nobody who came with it can wait any more
            ticket = await taking
            try:
                async with self._database.write_one() as connection:
                    await turn_queue.leave(connection, ticket)
            finally:
                self._step_out(session_id, ticket)

    def _step_out(self, session_id: str, ticket: int) -> None:
        line = self._lines[session_id]
        line.remove(ticket)
        if not line:
            del self._lines[session_id]
        self._on_moved(session_id)
