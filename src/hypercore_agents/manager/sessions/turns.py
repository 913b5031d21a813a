"""Begins and ends turns: the transactions around each turn, from top to bottom. `turn_relay.py` runs them.

A new session is placed and its first turn begun in one transaction of guarded statements, so that no agent ever holds
more sessions than its capacity. The next turn of a session waits up to `PATIENCE` seconds for the previous one, which
may be about to end (its last bytes are on their way). If the previous turn runs for longer, the request fails with a
conflict or, if it asked to be queued, waits for up to `QUEUE_SECONDS` (`turn_queue.py`). Where the session is placed is
decided in `placement.py`.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.chat import ChatRequest, Placement
from hypercore_agents.api.errors import Conflict, NotFound, Unavailable
from hypercore_agents.api.options import SessionOptions
from hypercore_agents.manager.change_signals import ChangeSignals
from hypercore_agents.manager.fleet.directory import AgentDirectory, Endpoint
from hypercore_agents.manager.rate_limits import RateLimits
from hypercore_agents.manager.sessions.options import refuse_changes
from hypercore_agents.manager.sessions.placement import ATTEMPTS, Placements
from hypercore_agents.manager.sessions.turn_queue import QueuedTurn, TurnQueues
from hypercore_agents.store import agents, leases, placement, sessions, turns
from hypercore_agents.store.database import Connection, Database
from hypercore_agents.store.placement import PLACEMENT
from hypercore_agents.store.session_lifecycle import SessionState
from hypercore_agents.store.sessions import SessionRow

_log = structlog.get_logger(__name__)

PATIENCE = 0.5
QUEUE_SECONDS = 60.0
_PAUSE_SECONDS = 0.05
_QUEUE_PAUSE_SECONDS = 0.2

IsGone = Callable[[], Awaitable[bool]]


@dataclass(frozen=True)
class TurnDefaults:
    """Limits of turns that the request does not set."""

    max_tokens: int | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class BegunTurn:
    """A turn that this process holds and must end in any case. `may_move`: any agent of the pool may run it."""

    request: ChatRequest
    endpoint: Endpoint
    placement: Placement
    may_move: bool = False

    @property
    def session_id(self) -> str:
        """The turn's session."""
        return self.placement.session_id

    @property
    def is_first(self) -> bool:
        """Whether the session is new. Its client does not have the session's id yet."""
        return self.request.session_id is None


class Turns:
    """Begins and ends turns. `holder`: this manager process; `clock` returns Unix seconds."""

    def __init__(
        self,
        *,
        database: Database,
        directory: AgentDirectory,
        placements: Placements,
        changes: ChangeSignals,
        limits: RateLimits,
        defaults: TurnDefaults,
        holder: str,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._directory = directory
        self._placements = placements
        self._changes = changes
        self._limits = limits
        self._defaults = defaults
        self._holder = holder
        self._clock = clock
        self._queues = TurnQueues(
            database, holder, max_wait=lambda: QUEUE_SECONDS, on_advance=changes.notify, clock=clock
        )

    async def begin(
        self, request: ChatRequest, *, agent_id: str | None = None, gone: IsGone | None = None
    ) -> BegunTurn:
        """Begin the next turn of a session, or the first of a new one, on the given agent or in the pool.

        `gone` returns whether the client has disconnected; a queued turn is then not begun.

        Raises NotFound if the session or agent is unknown, has ended or is another user's; Conflict if a turn is
        running or a frozen option would change; AtCapacity if there is no free place; Unavailable if the agent is not
        running; RateLimited.
        """
        if request.session_id is None:
            return await self._begin_first(request, agent_id)
        if request.when_busy != "queue":
            return await self._begin_next(request, request.session_id, agent_id)
        async with self._database.read() as connection:  # only turns that may use the session are queued
            _check(await sessions.get_session(connection, request.session_id), request, agent_id)
        async with self._queues.join(request.session_id) as queued:
            return await self._begin_queued(request, request.session_id, agent_id, queued, gone)

    async def _begin_first(self, request: ChatRequest, agent_id: str | None) -> BegunTurn:
        """Place a new session and begin its first turn, in one transaction."""
        for _ in range(ATTEMPTS):
            requested = None if agent_id is None else await self._placements.requested_agent(agent_id, request.user_id)
            begun = None
            async with self._database.write(exclusive=PLACEMENT) as connection:
                placed = await self._placements.place_new(connection, request, requested)
                if placed is not None:
                    session_id, endpoint = placed
                    await self._limits.take(connection, request.user_id)
                    row = await self._begin(connection, request, session_id)
                    assert row is not None
                    begun = _begun(request, endpoint, row, agent_id)
            if begun is not None:
                return begun
            if agent_id is not None or not await self._placements.reclaim_place(request.user_id):
                break
        raise await self._placements.why_no_place(request.user_id, agent_id)

    async def _begin_next(self, request: ChatRequest, session_id: str, agent_id: str | None) -> BegunTurn:
        """Begin the session's next turn, within `PATIENCE` and unless others are queued."""
        deadline = time.monotonic() + PATIENCE
        while True:
            late = time.monotonic() > deadline
            if not self._queues.has_queued(session_id):
                begun = await self._try_to_begin(request, session_id, agent_id)
                if begun is not None:
                    return begun
            if late:
                raise Conflict(
                    f"session {session_id} is running a turn; wait until it ends, or interrupt it",
                    details={"session_id": session_id},
                )
            await self._changes.wait(session_id, _PAUSE_SECONDS)

    async def _begin_queued(
        self, request: ChatRequest, session_id: str, agent_id: str | None, queued: QueuedTurn, gone: IsGone | None
    ) -> BegunTurn:
        """Begin the session's next turn when the queue has advanced to it, within `QUEUE_SECONDS`."""
        deadline = time.monotonic() + QUEUE_SECONDS
        while True:
            late = time.monotonic() > deadline
            if gone is not None and await gone():
                raise Conflict(
                    "the client disconnected before its queued turn began", details={"session_id": session_id}
                )
            # Checking for a running turn takes no lock; an attempt to begin does.
            if queued.is_first_in_process() and not await self._turn_runs(session_id):
                begun = await self._try_to_begin(request, session_id, agent_id, queued)
                if begun is not None:
                    queued.begun = True
                    return begun
            if late:
                raise Unavailable(
                    f"session {session_id} is still running a turn after {QUEUE_SECONDS:g} s; try again", retry_after=5
                )
            await self._changes.wait(session_id, _QUEUE_PAUSE_SECONDS)

    async def _turn_runs(self, session_id: str) -> bool:
        async with self._database.read() as connection:
            row = await sessions.get_session(connection, session_id)
            holder = row.turn_holder if row is not None else None
            return holder is not None and await leases.holder_lives(connection, holder, now=self._clock())

    async def _try_to_begin(
        self, request: ChatRequest, session_id: str, agent_id: str | None, queued: QueuedTurn | None = None
    ) -> BegunTurn | None:
        """Begin the session's next turn, on another agent if necessary. None: a turn is running, or another is next.

        Raises as `begin`.
        """
        while True:
            begun = None
            async with self._database.write() as connection:
                if queued is not None and not await queued.is_next(connection):
                    return None
                row = await self._begin(connection, request, session_id)
                if row is not None and row.agent_id is not None:
                    _check(row, request, agent_id)  # an error rolls the turn back
                    await self._limits.take(connection, request.user_id)
                    endpoint = await self._directory.find(row.agent_id, connection)
                    if queued is not None:
                        await queued.leave(connection)
                    begun = _begun(request, endpoint, row, agent_id)
            if begun is not None:
                return begun
            async with self._database.read() as connection:
                row = _check(await sessions.get_session(connection, session_id), request, agent_id)
                agent = await agents.get_agent(connection, row.agent_id) if row.agent_id is not None else None
            agent_runs = agent is not None and agent.state is AgentState.RUNNING
            if not agent_runs and row.kind is AgentKind.POOL and await self._placements.place_again(row):
                continue
            if row.turn_holder is not None:
                return None
            if not agent_runs:
                self._directory.forget(str(row.agent_id))
                raise Unavailable(f"the agent of session {session_id} is not running", retry_after=2)
            # The running turn ended between the two reads.

    async def _begin(self, connection: Connection, request: ChatRequest, session_id: str) -> SessionRow | None:
        temperature = request.temperature if request.temperature is not None else self._defaults.temperature
        return await turns.begin_turn(
            connection,
            session_id,
            holder=self._holder,
            max_tokens=request.max_tokens or self._defaults.max_tokens,
            temperature=temperature,
            now=self._clock(),
        )

    async def move(self, turn: BegunTurn, away_from: Sequence[str]) -> BegunTurn | None:
        """Move a turn that its agent could not begin to another agent of the pool, not one of `away_from`.

        The turn keeps its number and gets a higher generation; the returned turn must be ended instead of the given
        one. Returns None if no other agent has a free place.
        """
        async with self._database.write(exclusive=PLACEMENT) as connection:
            row = await placement.move_turn(
                connection,
                turn.session_id,
                generation=turn.placement.generation,
                turn=turn.placement.turn,
                away_from=away_from,
                now=self._clock(),
            )
            if row is None or row.agent_id is None:
                return None
            endpoint = await self._directory.find(row.agent_id, connection)
        _log.info("turn.moved", session_id=row.session_id, before=turn.endpoint.agent_id, agent_id=row.agent_id)
        return _begun(turn.request, endpoint, row, None)

    async def end(self, turn: BegunTurn) -> None:
        """End a turn; the session's next turn may begin."""
        async with self._database.write_one() as connection:
            await turns.end_turn(connection, turn.session_id, turn.placement.turn, now=self._clock())
        self._changes.notify(turn.session_id)

    async def discard(self, turn: BegunTurn) -> None:
        """End a turn and its session, whose id no client has; it would occupy a place without use."""
        async with self._database.write_one() as connection:
            await sessions.end_session(connection, turn.session_id, now=self._clock())


def placement_of(endpoint: Endpoint, session: SessionRow, turn: int) -> Placement:
    """Return what the agent receives about a session's placement and its turn of this number."""
    return Placement(
        session_id=session.session_id,
        generation=session.generation,
        turn=turn,
        timeout=endpoint.timeout,
        options=SessionOptions.stored(session.options),
    )


def _begun(request: ChatRequest, endpoint: Endpoint, row: SessionRow, agent_id: str | None) -> BegunTurn:
    return BegunTurn(
        request=request,
        endpoint=endpoint,
        placement=placement_of(endpoint, row, row.turn),
        may_move=agent_id is None and row.kind is AgentKind.POOL,
    )


def _check(session: SessionRow | None, request: ChatRequest, agent_id: str | None) -> SessionRow:
    """Return the session that a request names. Raises NotFound if it is not accessible, Conflict for other options."""
    if (
        session is None
        or session.state == SessionState.ENDED
        or session.user_id != request.user_id
        or (agent_id is not None and session.agent_id != agent_id)
    ):
        raise NotFound(f"there is no session {request.session_id}")
    refuse_changes(request.options(), session.options)
    return session
