"""A session's events as one stream, wherever the session is: what was, from the store; what comes, from its agent.

An agent's ring is asked first: where it holds all that comes after the id that the reader saw last, the reader misses
not even a delta. Else the log is told from there, then the agent's stream from the log's end. When that breaks off (the
agent is lost, the session moved or gave its place back) it begins again from the last id that was told; a session that
is on no agent is looked at until it is on one.

A reader gets every event of the log once, in order. A `reset` comes first where it saw deltas that are void, or where
the log was cut. A turn whose agent was lost ends with an `error` without an id: the log gets its own when the session
goes on.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from hypercore_agents.api.errors import AgentUnreachable, HypercoreError, NotFound
from hypercore_agents.api.events import (
    KEEPALIVE,
    KEEPALIVE_SECONDS,
    LOST_IN_MID_TURN,
    QUIET,
    EventId,
    Reset,
    encode,
    parse_id,
    show_id,
)
from hypercore_agents.kit.relay.upstream import Answer, Limits, Upstream
from hypercore_agents.manager.change_signals import ChangeSignals
from hypercore_agents.manager.fleet.directory import AgentDirectory, Endpoint
from hypercore_agents.manager.sessions.sessions import SessionScope, find_session
from hypercore_agents.store import events, leases
from hypercore_agents.store.database import Database
from hypercore_agents.store.events import EventRow
from hypercore_agents.store.sessions import SessionRow

STREAM_SECONDS = 3600.0
"""A stream ends after so long; who follows on asks again with the id that it saw last."""
LOOK_SECONDS = 1.0
"""Pause between looks at a session that is on no agent."""
LONGEST_LOOK_SECONDS = 4.0
"""The pause becomes as long while nothing changes; what changes in this process is heard at once."""
MOVED_SECONDS = 5.0
"""After so much silence of an agent it is looked whether the session is still there."""
_AGAIN_SECONDS = 0.2
_PAGE = 100
_LIMITS = Limits(connect=5, answer=15, idle=3 * KEEPALIVE_SECONDS)
_LONGEST_FRAME = 64 * 1024 * 1024


class EventStreams:
    """Follows sessions' events. `clock` returns Unix seconds."""

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

    async def find(self, session_id: str, within: SessionScope) -> SessionRow:
        """Return a session. Raises NotFound for one that is unknown, over, or out of the caller's reach."""
        async with self._database.read() as connection:
            return await find_session(connection, session_id, within)

    async def follow(self, session_id: str, within: SessionScope, last: EventId | None) -> AsyncGenerator[bytes, None]:
        """Yield whole frames after an id (None: all that are kept), and comments in silence, until the session ends."""
        reader = _Reader(last)
        told_now = False
        pause, before = LOOK_SECONDS, None
        while (look := await self._look(session_id, within)) is not None:
            row, newest = look
            answer = await self._open(row, reader.last, held=not told_now)
            if answer is not None:
                async with contextlib.aclosing(self._live(answer, row, within)) as live:
                    async for frames in live:
                        reader.saw(frames)
                        yield frames
                told_now = reader.caught_up = False
                await asyncio.sleep(_AGAIN_SECONDS)
                continue
            # An agent that does not hold all that the reader misses is asked for what it has once the log was told.
            if reader.misses(newest) or (row.agent_id is not None and not told_now):
                async with contextlib.aclosing(self._told(row, reader)) as told:
                    async for frames in told:
                        yield frames
                told_now = True
                continue
            if reader.newly_lost(await self._cut_off(row, newest)):
                yield encode(AgentUnreachable(LOST_IN_MID_TURN).body(""))
            elif reader.silent():
                yield KEEPALIVE
            now = (row.agent_id, row.generation, row.turn_holder, newest)
            pause, before = (min(2 * pause, LONGEST_LOOK_SECONDS) if now == before else LOOK_SECONDS), now
            await self._changes.wait(session_id, pause)
            told_now = False

    async def _look(self, session_id: str, within: SessionScope) -> tuple[SessionRow, EventRow | None] | None:
        """Return a session and the last event of its log; None: it is over. All that a quiet session costs."""
        try:
            async with self._database.read() as connection:
                row = await find_session(connection, session_id, within)
                return row, await events.newest(connection, session_id)
        except NotFound:
            return None

    async def _still(self, session_id: str, within: SessionScope) -> SessionRow | None:
        try:
            return await self.find(session_id, within)
        except NotFound:
            return None

    async def _open(self, row: SessionRow, last: EventId | None, *, held: bool) -> Answer | None:
        """Open the agent's stream; None when there is none to be had, or, with `held`, something would be missing."""
        if row.agent_id is None:
            return None
        try:
            endpoint: Endpoint = await self._directory.look_up(row.agent_id)
            headers = [("authorization", f"Bearer {endpoint.bearer}")]
            if last is not None:
                headers.append(("last-event-id", show_id(last)))
            url = f"{endpoint.address}/v1/agent/session/{row.session_id}/events/stream{'?held=true' if held else ''}"
            answer = await self._upstream.open("GET", url, headers=headers, limits=_LIMITS)
        except HypercoreError:
            return None
        if answer.status == 200:
            return answer
        answer.close()
        return None

    async def _live(self, answer: Answer, row: SessionRow, within: SessionScope) -> AsyncGenerator[bytes, None]:
        """Yield what the agent sends, in whole frames, until it ends or the session is elsewhere."""
        waiting = bytearray()
        reading: asyncio.Task[bytes] | None = None
        try:
            while True:
                reading = reading or asyncio.create_task(answer.next(), name="events.read")
                done, _ = await asyncio.wait((reading,), timeout=MOVED_SECONDS)
                if not done:
                    now = await self._still(row.session_id, within)
                    if now is None or (now.agent_id, now.generation) != (row.agent_id, row.generation):
                        return
                    continue
                chunk, reading = reading.result(), None
                waiting += chunk
                end = waiting.rfind(b"\n\n") + 2
                if end > 1:
                    yield bytes(waiting[:end])
                    del waiting[:end]
                if not chunk or len(waiting) > _LONGEST_FRAME:
                    return
        except HypercoreError:
            return
        finally:
            if reading is not None:
                reading.cancel()
                await asyncio.wait((reading,))
            answer.close()

    async def _told(self, row: SessionRow, reader: "_Reader") -> AsyncGenerator[bytes, None]:
        """Yield what the store has after the last event that was told."""
        session_id = row.session_id
        if reader.last is not None and reader.last[0] > row.generation:
            reader.last = None  # of no session's that we know
            yield encode(Reset(reason="the id that was seen last is none of this session's"))
        while True:
            async with self._database.read() as connection:
                # before the page: what is appended between the two must not count as told
                newest = await events.newest(connection, session_id)
                page = await events.page(connection, session_id, reader.last, limit=_PAGE)
            if page.cut or not page.known:
                yield encode(Reset(reason="what came in between is not kept, or is told as a whole now"))
            if page.rows:
                reader.last = page.rows[-1].event_id
                reader.spoken = True
                yield b"".join(map(_frame, page.rows))
            elif not page.known:
                reader.last = newest.event_id if newest is not None else None
            if not page.more:
                reader.caught_up = True
                return

    async def _cut_off(self, row: SessionRow, newest: EventRow | None) -> EventId | None:
        """Return the id of the log's last event if it is no end of a turn, and no turn runs."""
        if newest is None or newest.name in QUIET:
            return None
        if row.turn_holder is not None:
            async with self._database.read() as connection:
                if await leases.holder_lives(connection, row.turn_holder, now=self._clock()):
                    return None
        return newest.event_id


class _Reader:
    """How far a reader is."""

    def __init__(self, last: EventId | None) -> None:
        self.last = last
        self.spoken = False
        self.caught_up = False
        self._cut_at: EventId | None = None
        self._lost_told = False
        self._loop = asyncio.get_running_loop()
        self._cut_since = 0.0
        self._quiet_since = self._loop.time()

    def saw(self, frames: bytes) -> None:
        """Note the last id in whole frames."""
        start = frames.rfind(b"\nid: ") + 1
        if start == 0 and not frames.startswith(b"id: "):
            return
        self.last = parse_id(frames[start + 4 : frames.index(b"\n", start)].decode("ascii", "replace")) or self.last

    def misses(self, newest: EventRow | None) -> bool:
        """Say whether the log, whose last event is given, may have what was not told yet."""
        if not self.caught_up:
            return True
        return newest is not None and (self.last is None or newest.event_id > self.last)

    def newly_lost(self, cut_at: EventId | None) -> bool:
        """Say whether a turn's loss is to be told: its log breaks off, looked at twice, and that was not told yet.

        A turn is over a moment before its last event is in the log: one look does not tell it from a lost one.
        """
        now = self._loop.time()
        if cut_at != self._cut_at:
            self._cut_at, self._cut_since, self._lost_told = cut_at, now, False
            return False
        if cut_at is None or self._lost_told or now - self._cut_since < LOOK_SECONDS:
            return False
        self._lost_told = True
        return True

    def silent(self) -> bool:
        """Say whether it is time for a comment."""
        now = self._loop.time()
        if self.spoken or now - self._quiet_since >= KEEPALIVE_SECONDS:
            said, self.spoken, self._quiet_since = self.spoken, False, now
            return not said
        return False


def _frame(row: EventRow) -> bytes:
    return f"id: {show_id(row.event_id)}\nevent: {row.name}\ndata: {row.data}\n\n".encode()
