"""Streams a session's events while the session moves between agents: stored events first, then its agent's stream.

The agent's event ring is tried first: if it holds everything after the last id that the reader saw, the reader misses
nothing, not even a delta. Otherwise the stored events are sent from that id, then the agent's stream from the end of
the stored ones. If the agent's stream ends early (the agent is lost, the session moved or was unplaced), this starts
over from the last id sent. An unplaced session is polled until it is placed.

A reader receives every stored event once, in order. A `reset` precedes them if the reader saw deltas that are no longer
valid, or if old events were deleted. A turn whose agent was lost ends with an `error` without an id; the stored events
get their own `error` when the session continues.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from hypercore_agents.api.errors import AgentUnreachable, HypercoreError, NotFound
from hypercore_agents.api.events import (
    KEEPALIVE,
    KEEPALIVE_SECONDS,
    LOST_DURING_TURN,
    QUIET,
    EventId,
    Reset,
    encode,
    parse_id,
    show_id,
)
from hypercore_agents.kit.relay.upstream import RequestLimits, Upstream, UpstreamResponse
from hypercore_agents.manager.change_signals import ChangeSignals
from hypercore_agents.manager.fleet.directory import AgentDirectory, Endpoint
from hypercore_agents.manager.sessions.access import SessionAccess, find_session
from hypercore_agents.store import events, leases
from hypercore_agents.store.database import Database
from hypercore_agents.store.events import EventRow
from hypercore_agents.store.sessions import SessionRow

STREAM_SECONDS = 3600.0
"""Maximum duration of a stream. Clients reconnect with the last id that they saw."""
POLL_SECONDS = 1.0
"""Pause between reads of an unplaced session."""
MAX_POLL_SECONDS = 4.0
"""The pause grows to this while nothing changes. Changes by this process end the pause at once."""
MOVED_SECONDS = 5.0
"""When an agent has sent nothing for this long, the session's placement is checked."""
_RETRY_SECONDS = 0.2
_PAGE = 100
_LIMITS = RequestLimits(connect=5, response=15, idle=3 * KEEPALIVE_SECONDS)
_MAX_FRAME = 64 * 1024 * 1024


class EventStreams:
    """Streams sessions' events. `clock` returns Unix seconds."""

    def __init__(
        self,
        *,
        database: Database,
        directory: AgentDirectory,
        upstream: Upstream,
        changes: ChangeSignals,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._directory = directory
        self._upstream = upstream
        self._changes = changes
        self._clock = clock

    async def find(self, session_id: str, access: SessionAccess) -> SessionRow:
        """Return a session. Raises NotFound if it is unknown, has ended, or is not accessible to the caller."""
        async with self._database.read() as connection:
            return await find_session(connection, session_id, access)

    async def follow(self, session_id: str, access: SessionAccess, last: EventId | None) -> AsyncGenerator[bytes, None]:
        """Yield whole frames after an id (None: all that are stored), and comments while idle, until the session
        ends."""
        reader = _Reader(last)
        just_read_store = False
        pause, before = POLL_SECONDS, None
        while (state := await self._read_state(session_id, access)) is not None:
            row, newest = state
            response = await self._open(row, reader.last, complete=not just_read_store)
            if response is not None:
                async with contextlib.aclosing(self._live(response, row, access)) as live:
                    async for frames in live:
                        reader.saw(frames)
                        yield frames
                just_read_store = reader.caught_up = False
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            # If the agent's ring does not hold everything that the reader misses, the store is read first.
            if reader.misses(newest) or (row.agent_id is not None and not just_read_store):
                async with contextlib.aclosing(self._stored(row, reader)) as stored:
                    async for frames in stored:
                        yield frames
                just_read_store = True
                continue
            if reader.newly_lost(await self._cut_off(row, newest)):
                yield encode(AgentUnreachable(LOST_DURING_TURN).body(""))
            elif reader.needs_keepalive():
                yield KEEPALIVE
            now = (row.agent_id, row.generation, row.turn_holder, newest)
            pause, before = (min(2 * pause, MAX_POLL_SECONDS) if now == before else POLL_SECONDS), now
            await self._changes.wait(session_id, pause)
            just_read_store = False

    async def _read_state(self, session_id: str, access: SessionAccess) -> tuple[SessionRow, EventRow | None] | None:
        """Return a session and its last stored event; None if it has ended. The only cost of an idle session."""
        try:
            async with self._database.read() as connection:
                row = await find_session(connection, session_id, access)
                return row, await events.newest(connection, session_id)
        except NotFound:
            return None

    async def _has_moved(self, row: SessionRow, access: SessionAccess) -> bool:
        try:
            now = await self.find(row.session_id, access)
        except NotFound:
            return True
        return (now.agent_id, now.generation) != (row.agent_id, row.generation)

    async def _open(self, row: SessionRow, last: EventId | None, *, complete: bool) -> UpstreamResponse | None:
        """Open the agent's stream. None: there is none or, with `complete`, its ring lacks events after `last`."""
        if row.agent_id is None:
            return None
        try:
            endpoint: Endpoint = await self._directory.look_up(row.agent_id)
            headers = [("authorization", f"Bearer {endpoint.bearer}")]
            if last is not None:
                headers.append(("last-event-id", show_id(last)))
            query = "?held=true" if complete else ""
            url = f"{endpoint.address}/v1/agent/session/{row.session_id}/events/stream{query}"
            response = await self._upstream.open("GET", url, headers=headers, limits=_LIMITS)
        except HypercoreError:
            return None
        if response.status == 200:
            return response
        response.close()
        return None

    async def _live(
        self, response: UpstreamResponse, row: SessionRow, access: SessionAccess
    ) -> AsyncGenerator[bytes, None]:
        """Yield the agent's frames, whole, until its stream ends or the session moves."""
        received = bytearray()
        reading: asyncio.Task[bytes] | None = None
        try:
            while True:
                reading = reading or asyncio.create_task(response.next_chunk(), name="events.read")
                done, _ = await asyncio.wait((reading,), timeout=MOVED_SECONDS)
                if not done:
                    if await self._has_moved(row, access):
                        return
                    continue
                chunk, reading = reading.result(), None
                received += chunk
                end = received.rfind(b"\n\n") + 2
                if end > 1:
                    yield bytes(received[:end])
                    del received[:end]
                if not chunk or len(received) > _MAX_FRAME:
                    return
        except HypercoreError:
            return
        finally:
            if reading is not None:
                reading.cancel()
                await asyncio.wait((reading,))
            response.close()

    async def _stored(self, row: SessionRow, reader: "_Reader") -> AsyncGenerator[bytes, None]:
        """Yield the stored events after the reader's last one."""
        session_id = row.session_id
        if reader.last is not None and reader.last[0] > row.generation:
            reader.last = None
            yield encode(Reset(reason="the last event id does not belong to this session"))
        while True:
            async with self._database.read() as connection:
                # Read before the page: an event that is appended between the two reads must not count as sent.
                newest = await events.newest(connection, session_id)
                page = await events.page(connection, session_id, reader.last, limit=_PAGE)
            if page.cut or not page.known:
                yield encode(Reset(reason="events in between are no longer stored, or are sent again as a whole"))
            if page.rows:
                reader.last = page.rows[-1].event_id
                reader.sent = True
                yield b"".join(map(_frame, page.rows))
            elif not page.known:
                reader.last = newest.event_id if newest is not None else None
            if not page.more:
                reader.caught_up = True
                return

    async def _cut_off(self, row: SessionRow, newest: EventRow | None) -> EventId | None:
        """Return the id of the last stored event if it does not end a turn, and no turn is running."""
        if newest is None or newest.name in QUIET:
            return None
        if row.turn_holder is not None:
            async with self._database.read() as connection:
                if await leases.holder_lives(connection, row.turn_holder, now=self._clock()):
                    return None
        return newest.event_id


class _Reader:
    """The position of a reader in a session's events."""

    def __init__(self, last: EventId | None) -> None:
        self.last = last
        self.sent = False
        self.caught_up = False
        self._cut_at: EventId | None = None
        self._loss_reported = False
        self._loop = asyncio.get_running_loop()
        self._cut_since = 0.0
        self._quiet_since = self._loop.time()

    def saw(self, frames: bytes) -> None:
        """Record the last id in whole frames."""
        start = frames.rfind(b"\nid: ") + 1
        if start == 0 and not frames.startswith(b"id: "):
            return
        self.last = parse_id(frames[start + 4 : frames.index(b"\n", start)].decode("ascii", "replace")) or self.last

    def misses(self, newest: EventRow | None) -> bool:
        """Return whether there may be stored events, of which `newest` is the last, that were not sent yet."""
        if not self.caught_up:
            return True
        return newest is not None and (self.last is None or newest.event_id > self.last)

    def newly_lost(self, cut_at: EventId | None) -> bool:
        """Return whether to report a turn as lost: its events break off at `cut_at`, and that was not reported yet.

        A turn ends a moment before its last event is stored, so its loss is reported only after a second read.
        """
        now = self._loop.time()
        if cut_at != self._cut_at:
            self._cut_at, self._cut_since, self._loss_reported = cut_at, now, False
            return False
        if cut_at is None or self._loss_reported or now - self._cut_since < POLL_SECONDS:
            return False
        self._loss_reported = True
        return True

    def needs_keepalive(self) -> bool:
        """Return whether a comment is due, because nothing was sent for `KEEPALIVE_SECONDS`."""
        now = self._loop.time()
        if self.sent or now - self._quiet_since >= KEEPALIVE_SECONDS:
            sent, self.sent, self._quiet_since = self.sent, False, now
            return not sent
        return False


def _frame(row: EventRow) -> bytes:
    return f"id: {show_id(row.event_id)}\nevent: {row.name}\ndata: {row.data}\n\n".encode()
