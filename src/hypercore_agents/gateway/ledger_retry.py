"""Ledger entries that could not be written when their answers ended (a full disk, a store that is away): written later.

While there is one, no model request is sent on: its usage could not be written either, and its turn would fail after
it was paid for. Whoever asks next tries again, and so does a loop; the entries keep their order. They live in this
process, so each is in its log too (`ledger.unwritten`, `ledger.written_late`), for the case that it ends before.
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
    """The entries of one gateway that wait for the store."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._entries: deque[tuple[LedgerEntry, Reservation | None]] = deque()
        self._trying: asyncio.Task[None] | None = None

    def add(self, entry: LedgerEntry, reservation: Reservation | None) -> None:
        """Take an entry to be written later; `reservation` is told when it is."""
        self._entries.append((entry, reservation))
        _log.error("ledger.unwritten", **vars(entry))

    async def write(self) -> None:
        """Write what waits, if anything does. Raises Unavailable while the store does not take it.

        All who ask share one try: a store that is away makes them wait for it once, not one after another. Whoever
        leaves does not end it: an entry that was inserted is not waiting any more.
        """
        if not self._entries:
            return
        if self._trying is None or self._trying.done():
            self._trying = asyncio.create_task(self._write_all())
            self._trying.add_done_callback(self._tried)
        await asyncio.shield(self._trying)

    async def _write_all(self) -> None:
        while self._entries:
            entry, reservation = self._entries[0]
            async with reservation.lock if reservation is not None else contextlib.nullcontext():
                async with self._database.write_one() as connection:
                    await add_entry(connection, entry)
                self._entries.popleft()
                if reservation is not None:
                    reservation.written()
            _log.warning("ledger.written_late", session_id=entry.session_id, turn=entry.turn)

    def _tried(self, task: asyncio.Task[None]) -> None:
        if self._trying is task:
            self._trying = None
        if not task.cancelled():
            task.exception()  # told to whoever still waits

    async def write_if_possible(self) -> None:
        """Write what waits, or leave it for the next time."""
        with contextlib.suppress(Unavailable):
            await self.write()
