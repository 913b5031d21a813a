"""The queues of turns that wait for a session's running turn to end: first come, first served, over all processes.

Each queued turn has a ticket in the store. The lowest ticket of a session is next; this is checked in the transaction
that begins the turn. In each process only the first queued turn of a session queries the store. A turn that does not
queue is not begun while others are queued in the same process. A session belongs to one user, so users never wait for
one another in a queue.

The tickets of a process that died stop counting when its lease expires; a ticket that could not be removed stops
counting after the maximum wait.

Rejected: one queue per process, whose first turns compete. A process whose turn has just ended would also take the next
one, so prompts would run out of order, and those of other processes would wait for all of them.
"""

import asyncio
import bisect
import contextlib
from collections.abc import AsyncIterator, Callable

from hypercore_agents.api.errors import Unavailable
from hypercore_agents.store import turn_queue
from hypercore_agents.store.database import Connection, Database

RETAINED_SECONDS = 300.0
"""Age at which tickets are deleted; much longer than a turn may wait."""


class QueuedTurn:
    """A turn in a session's queue. Set `begun` once it has begun and `leave` has been committed."""

    def __init__(self, session_id: str, ticket: int, queues: "TurnQueues", local: list[int]) -> None:
        self.begun = False
        self._session_id = session_id
        self._ticket = ticket
        self._queues = queues
        self._local = local

    def is_first_in_process(self) -> bool:
        """Return whether no other turn of this process is before this one."""
        return self._local[0] == self._ticket

    async def is_next(self, connection: Connection) -> bool:
        """Return whether no other turn is before this one. Call it in the transaction that begins the turn."""
        return await self._queues.is_next(connection, self._session_id, self._ticket)

    async def leave(self, connection: Connection) -> None:
        """Leave the queue, in the transaction that begins the turn."""
        await turn_queue.leave(connection, self._ticket)


class TurnQueues:
    """The queues of all sessions. `holder`: this manager process; `max_wait` returns the longest wait of a turn, in
    seconds; `on_advance` is called with a session whose queue in this process has advanced; `clock` returns Unix
    seconds."""

    def __init__(
        self,
        database: Database,
        holder: str,
        *,
        max_wait: Callable[[], float],
        on_advance: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._holder = holder
        self._max_wait = max_wait
        self._on_advance = on_advance
        self._clock = clock
        self._tickets: dict[str, list[int]] = {}

    def has_queued(self, session_id: str) -> bool:
        """Return whether turns of a session are queued in this process."""
        return session_id in self._tickets

    async def is_next(self, connection: Connection, session_id: str, ticket: int) -> bool:
        """Return whether no ticket is before this one, in any process."""
        now = self._clock()
        since = now - 2 * self._max_wait()
        return await turn_queue.is_next(connection, session_id, ticket, self._holder, since=since, now=now)

    @contextlib.asynccontextmanager
    async def join(self, session_id: str) -> AsyncIterator[QueuedTurn]:
        """Queue a turn until the block ends."""
        joining = asyncio.create_task(self._join(session_id), name="turn-queue.join")
        try:
            ticket = await asyncio.shield(joining)
        except asyncio.CancelledError:  # the ticket may be in the store already, or may still be written
            await asyncio.shield(self._leave(session_id, joining))
            raise
        queued = QueuedTurn(session_id, ticket, self, self._tickets[session_id])
        try:
            yield queued
        finally:
            if queued.begun:
                self._advance(session_id, ticket)
            else:
                await asyncio.shield(self._leave(session_id, joining))

    async def _join(self, session_id: str) -> int:
        async with self._database.write() as connection:
            ticket = await turn_queue.join(connection, session_id, self._holder, now=self._clock())
        # Transactions may end in another order than they began.
        bisect.insort(self._tickets.setdefault(session_id, []), ticket)
        return ticket

    async def _leave(self, session_id: str, joining: asyncio.Task[int]) -> None:
        """Remove a ticket that may still be joining. Runs shielded."""
        with contextlib.suppress(Unavailable):  # the ticket then counts until the maximum wait has passed
            ticket = await joining
            try:
                async with self._database.write_one() as connection:
                    await turn_queue.leave(connection, ticket)
            finally:
                self._advance(session_id, ticket)

    def _advance(self, session_id: str, ticket: int) -> None:
        tickets = self._tickets[session_id]
        tickets.remove(ticket)
        if not tickets:
            del self._tickets[session_id]
        self._on_advance(session_id)
