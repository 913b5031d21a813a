"""Retries ledger entries that the store did not accept when their answers ended (a full disk, no connection).

While an entry is waiting, no model request is sent on: its usage could not be written either, and its turn would fail
after it was paid for. The next request retries, and so does a loop; entries keep their order. They are only in the
memory of this process, so each is also logged (`ledger.write_failed`, `ledger.write_recovered`) in case the process
ends.
"""

import asyncio
import contextlib
from collections import deque

import structlog

from hypercore_agents.api.errors import Unavailable
from hypercore_agents.gateway.budget import Reservation
from hypercore_agents.store.database import Database
from hypercore_agents.store.ledger import LedgerEntry, add_entry

_log = structlog.get_logger(__name__)
RETRY_SECONDS = 2.0


class LedgerRetry:
    """The ledger entries of one gateway that are waiting for the store."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._entries: deque[tuple[LedgerEntry, Reservation | None]] = deque()
        self._attempt: asyncio.Task[None] | None = None

    def add(self, entry: LedgerEntry, reservation: Reservation | None) -> None:
        """Queue an entry, and mark its `reservation` as recorded once the entry is written."""
        self._entries.append((entry, reservation))
        _log.error("ledger.write_failed", **vars(entry))

    async def write(self) -> None:
        """Write all waiting entries, if any. Raises Unavailable while the store does not accept them.

        Concurrent callers share one attempt, so an unavailable store delays them once, not one after another.
        Cancelling a caller does not cancel the attempt: an inserted entry must leave the queue.
        """
        if not self._entries:
            return
        if self._attempt is None or self._attempt.done():
            self._attempt = asyncio.create_task(self._write_all())
            self._attempt.add_done_callback(self._attempt_done)
        await asyncio.shield(self._attempt)

    async def _write_all(self) -> None:
        while self._entries:
            entry, reservation = self._entries[0]
            async with reservation.lock if reservation is not None else contextlib.nullcontext():
                async with self._database.write_one() as connection:
                    await add_entry(connection, entry)
                self._entries.popleft()
                if reservation is not None:
                    reservation.recorded()
            _log.warning("ledger.write_recovered", session_id=entry.session_id, turn=entry.turn)

    def _attempt_done(self, task: asyncio.Task[None]) -> None:
        if self._attempt is task:
            self._attempt = None
        if not task.cancelled():
            task.exception()  # marks it as retrieved; callers that still wait get it from the task

    async def try_write(self) -> None:
        """Write all waiting entries, or leave them for the next attempt."""
        with contextlib.suppress(Unavailable):
            await self.write()
