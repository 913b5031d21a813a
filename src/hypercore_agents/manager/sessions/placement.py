"""Where a session lives, and who may run its next turn: the write transaction with which every turn begins.

A new session is placed and its first turn begun in one transaction, in guarded statements, so that no agent ever
holds more sessions than it has room for. A turn that is just ending (its answer's last bytes are on their way) is
waited for, for `PATIENCE` seconds; one that goes on for longer is a conflict, or, for a request that asked to be
queued, waited for up to `QUEUE_SECONDS`. Of several that wait the one that came first is next, in whichever process
(`lines`).

A session of the pool whose agent drains, or is gone, is placed anew by its next turn, with a higher generation; what
its old agent still says in its name is refused. A dedicated agent's sessions never move.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import structlog

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.chat import ChatRequest, Placement, SessionOpening
from hypercore_agents.api.errors import AtCapacity, Conflict, NotFound, RateLimited, Unavailable
from hypercore_agents.api.ids import new_session_id
from hypercore_agents.api.options import SessionOptions
from hypercore_agents.manager.change_signals import ChangeSignals
from hypercore_agents.manager.fleet import lifecycle
from hypercore_agents.manager.fleet.directory import AgentDirectory, Endpoint
from hypercore_agents.manager.limits import RateLimits
from hypercore_agents.manager.open_responses import most_places
from hypercore_agents.manager.sessions.options import freeze, refuse_changes
from hypercore_agents.manager.sessions.reclaim import FRESH_SECONDS, Places
from hypercore_agents.manager.sessions.sessions import SessionScope, find_session
from hypercore_agents.manager.sessions.turn_queue import Place, TurnQueues
from hypercore_agents.store import agents, leases, sessions
from hypercore_agents.store.database import Connection, Database
from hypercore_agents.store.sessions import ENDED, PLACEMENT, SessionRow

_log = structlog.get_logger(__name__)

PATIENCE = 0.5
QUEUE_SECONDS = 60.0
_LOOK_SECONDS = 0.05
_QUEUE_LOOK_SECONDS = 0.2
_LOOKS = 3
_RECLAIMS = 3
"""How often a place is sought: another turn may take the one that was just freed."""
_TOUCH_SECONDS = FRESH_SECONDS / 2
"""A session whose files are used is written down as used at most this often: by its last use it keeps its place."""


@dataclass(frozen=True)
class TurnDefaults:
    """What a turn gets that does not say otherwise. `pool` and `platform`: session options."""

    pool: SessionOptions
    platform: SessionOptions
    max_tokens: int | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class UserShares:
    """What one user may have: a share of the pool's places (0 to 1), and so many sessions (0: no limit)."""

    places: float = 1.0
    sessions: int = 0


@dataclass(frozen=True)
class BegunTurn:
    """A turn that this process holds: it must be ended, whatever happens."""

    request: ChatRequest
    endpoint: Endpoint
    placement: Placement
    may_move: bool = False
    """Whether another agent of the pool may run it: nobody asked for this one."""

    @property
    def session_id(self) -> str:
        """The session that the turn belongs to."""
        return self.placement.session_id

    @property
    def is_first(self) -> bool:
        """Whether the session is new: nobody outside knows its id yet."""
        return self.request.session_id is None


@dataclass(frozen=True)
class HeldSession:
    """A session that is on a running agent. `running`: a turn of it runs there, so the agent has it."""

    endpoint: Endpoint
    opening: SessionOpening
    running: bool


class Placements:
    """Begins and ends turns. `holder` is this manager process, `clock` returns Unix seconds."""

    def __init__(
        self,
        *,
        database: Database,
        directory: AgentDirectory,
        changes: ChangeSignals,
        defaults: TurnDefaults,
        limits: RateLimits,
        places: Places,
        shares: UserShares,
        holder: str,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._directory = directory
        self._changes = changes
        self._defaults = defaults
        self._limits = limits
        self._places = places
        self._shares = shares
        self._holder = holder
        self._clock = clock
        self._lines = TurnQueues(database, holder, longest=lambda: QUEUE_SECONDS, on_moved=changes.notify, clock=clock)

    async def begin(
        self, request: ChatRequest, *, agent_id: str | None = None, gone: Callable[[], Awaitable[bool]] | None = None
    ) -> BegunTurn:
        """Take the next turn of a session, or of a new one, on the given agent or in the pool.

        `gone` says whether whoever asked has left: then a turn that waits is never begun.

        Raises NotFound for a session or agent that is unknown, over or somebody else's; Conflict when a turn runs or a
        frozen option would change; AtCapacity when no agent has room; Unavailable when the agent is not running;
        RateLimited.
        """
        if request.session_id is None:
            return await self._begin_new(request, agent_id)
        return await self._begin_next(request, request.session_id, agent_id, gone)

    async def hold(self, session_id: str, within: SessionScope) -> HeldSession:
        """Return where a session is, placing it as its next turn would where it is on no running agent.

        Raises NotFound, AtCapacity when no agent has room, Unavailable when its agent does not run and it cannot move.
        """
        for _ in range(_LOOKS):
            async with self._database.read() as connection:
                row = await find_session(connection, session_id, within)
                agent = await agents.get_agent(connection, row.agent_id) if row.agent_id is not None else None
                holder = row.turn_holder
                running = holder is not None and await leases.holder_lives(connection, holder, now=self._clock())
            if agent is None or agent.state is not AgentState.RUNNING:
                if row.kind is AgentKind.POOL:
                    await self._moved(row)
                continue
            endpoint = await self._directory.look_up(agent.agent_id)
            if self._clock() - row.last_used_at > _TOUCH_SECONDS:
                async with self._database.write_one() as connection:
                    await sessions.touch(connection, session_id, now=self._clock())
            placement = _placement(endpoint, row, row.turn + 1)
            return HeldSession(endpoint, SessionOpening(user_id=row.user_id, placement=placement), running)
        raise Unavailable(f"the agent of session {session_id} is not running", retry_after=2)

    async def move(self, turn: BegunTurn, away_from: Sequence[str]) -> BegunTurn | None:
        """Place a turn that could not begin on another agent of the pool; None where none but `away_from` has room.

        The turn goes on under its number and a higher generation; the turn that was given is not to be ended then.
        """
        async with self._database.write(exclusive=PLACEMENT) as connection:
            row = await sessions.move_turn(
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
        return self._begun(turn.request, endpoint, row, None)

    async def end(self, turn: BegunTurn) -> None:
        """Free the session for its next turn."""
        async with self._database.write_one() as connection:
            await sessions.end_turn(connection, turn.session_id, turn.placement.turn, now=self._clock())
        self._changes.notify(turn.session_id)

    async def discard(self, turn: BegunTurn) -> None:
        """End the session of a turn for good: nobody knows its id, and it must hold no place."""
        async with self._database.write_one() as connection:
            await sessions.end_session(connection, turn.session_id, now=self._clock())

    async def _begin_new(self, request: ChatRequest, agent_id: str | None) -> BegunTurn:
        for _ in range(_RECLAIMS):
            begun = await self._try_new(request, agent_id)
            if begun is not None:
                return begun
            if agent_id is not None or not await self._reclaimed(request.user_id):
                break
        raise await self._no_room(agent_id, request.user_id)

    async def _reclaimed(self, user_id: str) -> bool:
        """Free a place for a user; return whether it is worth trying again."""
        return await self._places.reclaim(user_id, own=await self._over_share(user_id))

    async def _over_share(self, user_id: str) -> bool:
        async with self._database.read() as connection:
            held, places = await sessions.count_places(connection, user_id)
        return self._most_places(places) <= held < places

    def _most_places(self, places: int) -> int:
        return most_places(places, self._shares.places)

    async def _try_new(self, request: ChatRequest, agent_id: str | None) -> BegunTurn | None:
        """Place a new session and begin its first turn; None when there is no place for it."""
        endpoint = await self._directory.find(agent_id) if agent_id is not None else None
        if endpoint is not None and endpoint.kind is AgentKind.DEDICATED and endpoint.user_id != request.user_id:
            raise NotFound(f"there is no agent {agent_id}")
        defaults = endpoint.options if endpoint is not None else self._defaults.pool
        options = freeze(request.options().with_defaults(defaults.with_defaults(self._defaults.platform)))
        session_id = new_session_id()
        async with self._database.write(exclusive=PLACEMENT) as connection:
            await self._check_sessions(connection, request.user_id)
            chosen = await sessions.place_new(
                connection,
                session_id=session_id,
                user_id=request.user_id,
                options=options,
                now=self._clock(),
                agent_id=agent_id,
                share=self._shares.places,
            )
            if chosen is not None:
                await self._limits.take(connection, request.user_id)
                row = await sessions.begin_turn(
                    connection,
                    session_id,
                    holder=self._holder,
                    max_tokens=request.max_tokens or self._defaults.max_tokens,
                    temperature=self._temperature(request),
                    now=self._clock(),
                )
                endpoint = await self._directory.find(chosen, connection)
                if row is not None and agent_id is None and endpoint.options != self._defaults.pool:
                    options = freeze(
                        request.options().with_defaults(endpoint.options.with_defaults(self._defaults.platform))
                    )
                    await sessions.set_options(connection, session_id, options)  # the pool was rolled to others
                    row = replace(row, options=options)
        if chosen is None:
            return None
        assert row is not None
        assert endpoint is not None
        return self._begun(request, endpoint, row, agent_id)

    async def _check_sessions(self, connection: Connection, user_id: str) -> None:
        most = self._shares.sessions
        if most and (held := await sessions.count_of_user(connection, user_id, most=most)) >= most:
            raise RateLimited(
                f"user {user_id} has {held} sessions and may have {most} (MAX_SESSIONS_PER_USER); delete some first",
                details={"share": "sessions", "used": held, "limit": most},
                retry_after=60,
            )

    async def _begin_next(
        self, request: ChatRequest, session_id: str, agent_id: str | None, gone: Callable[[], Awaitable[bool]] | None
    ) -> BegunTurn:
        if request.when_busy != "queue":
            return await self._take_turn(request, session_id, agent_id, None, None)
        async with self._database.read() as connection:  # only who may use a session stands in its line
            _check(await sessions.get_session(connection, session_id), request, session_id, agent_id)
        async with self._lines.join(session_id) as place:
            return await self._take_turn(request, session_id, agent_id, place, gone)

    async def _take_turn(
        self,
        request: ChatRequest,
        session_id: str,
        agent_id: str | None,
        place: Place | None,
        gone: Callable[[], Awaitable[bool]] | None,
    ) -> BegunTurn:
        """Take the session's next turn as soon as it can be had and is this request's, which waits in line or not."""
        give_up = time.monotonic() + (PATIENCE if place is None else QUEUE_SECONDS)
        while True:
            late = time.monotonic() > give_up
            if gone is not None and await gone():
                raise Conflict("whoever asked left before the session's turn came", details={"session_id": session_id})
            if place is None:
                tries = not self._lines.waits(session_id)
            else:  # who waits for long looks often: to look takes no lock, to try does
                tries = place.first() and not await self._runs_turn(session_id)
            if tries:
                begun = await self._try_turn(request, session_id, agent_id, place)
                if begun is not None:
                    return begun
            if late and place is not None:
                raise Unavailable(
                    f"session {session_id} is still in the middle of a turn after {QUEUE_SECONDS:g} s; try again",
                    retry_after=5,
                )
            if late:
                raise Conflict(
                    f"session {session_id} is in the middle of a turn; wait for its end, or interrupt it",
                    details={"session_id": session_id},
                )
            await self._changes.wait(session_id, _LOOK_SECONDS if place is None else _QUEUE_LOOK_SECONDS)

    async def _try_turn(
        self, request: ChatRequest, session_id: str, agent_id: str | None, place: Place | None
    ) -> BegunTurn | None:
        """Take the session's next turn, on another agent if need be; None while it runs one, or it is somebody else's.

        Raises as `begin`.
        """
        while True:
            begun = None
            async with self._database.write() as connection:
                if place is not None and not await place.is_next(connection):
                    return None
                row = await sessions.begin_turn(
                    connection,
                    session_id,
                    holder=self._holder,
                    max_tokens=request.max_tokens or self._defaults.max_tokens,
                    temperature=self._temperature(request),
                    now=self._clock(),
                )
                if row is not None and row.agent_id is not None:
                    _check(row, request, session_id, agent_id)  # what it raises takes the turn back
                    await self._limits.take(connection, request.user_id)
                    endpoint = await self._directory.find(row.agent_id, connection)
                    if place is not None:
                        await place.leave(connection)
                    begun = self._begun(request, endpoint, row, agent_id)
            if begun is not None:
                if place is not None:
                    place.taken = True
                return begun
            async with self._database.read() as connection:
                before = _check(await sessions.get_session(connection, session_id), request, session_id, agent_id)
                agent = await agents.get_agent(connection, before.agent_id) if before.agent_id is not None else None
            lost = agent is None or agent.state is not AgentState.RUNNING
            if lost and before.kind is AgentKind.POOL and await self._moved(before):
                continue
            if before.turn_holder is None and not lost:
                continue  # its turn ended between the two looks
            if before.turn_holder is None:
                self._directory.forget(str(before.agent_id))
                raise Unavailable(f"the agent of session {session_id} is not running", retry_after=2)
            return None

    async def _runs_turn(self, session_id: str) -> bool:
        async with self._database.read() as connection:
            row = await sessions.get_session(connection, session_id)
            holder = row.turn_holder if row is not None else None
            return holder is not None and await leases.holder_lives(connection, holder, now=self._clock())

    async def _moved(self, session: SessionRow) -> bool:
        """Place a session of the pool anew whose agent runs no more. Raises AtCapacity when no agent has room, and
        RateLimited when its user holds too many places."""
        for _ in range(_RECLAIMS):
            async with self._database.write(exclusive=PLACEMENT) as connection:
                chosen = await sessions.place_again(
                    connection,
                    session.session_id,
                    now=self._clock(),
                    user_id=session.user_id,
                    share=self._shares.places,
                )
                current = await sessions.get_session(connection, session.session_id)
            if chosen is not None:
                _log.info("session.moved", session_id=session.session_id, before=session.agent_id, agent_id=chosen)
                return True
            if current is None or current.agent_id is not None or current.state == ENDED:
                return False
            if not await self._reclaimed(session.user_id):
                break
        raise await self._no_room(None, session.user_id)

    def _begun(self, request: ChatRequest, endpoint: Endpoint, row: SessionRow, agent_id: str | None) -> BegunTurn:
        return BegunTurn(
            request=request,
            endpoint=endpoint,
            placement=_placement(endpoint, row, row.turn),
            may_move=agent_id is None and row.kind is AgentKind.POOL,
        )

    def _temperature(self, request: ChatRequest) -> float | None:
        return request.temperature if request.temperature is not None else self._defaults.temperature

    async def _no_room(self, agent_id: str | None, user_id: str) -> AtCapacity | NotFound | RateLimited | Unavailable:
        async with self._database.read() as connection:
            if agent_id is None:
                held, places = await sessions.count_places(connection, user_id)
                if (most := self._most_places(places)) <= held < places:
                    return RateLimited(
                        f"user {user_id} holds {held} of the pool's {places} places, the most that one user may hold "
                        f"(PLACES_PER_USER={self._shares.places:g}), and all are in use; wait until a turn ends, or "
                        "delete a session",
                        details={"share": "places", "used": held, "limit": most},
                        retry_after=5,
                    )
                rows = await agents.list_agents(connection, kind=AgentKind.POOL)
            else:
                one = await agents.get_agent(connection, agent_id)
                rows = [one] if one is not None else []
            placed = await agents.sessions_per_agent(connection, [row.agent_id for row in rows])
        running = [row for row in rows if row.state is AgentState.RUNNING]
        if agent_id is not None and not running:
            self._directory.forget(agent_id)
            if not rows or rows[0].state in lifecycle.ENDED:
                return NotFound(f"there is no agent {agent_id}")
            return Unavailable(f"agent {agent_id} is not running", retry_after=2)
        numbers = {
            "agents_running": len(running),
            "agents_starting": sum(row.state in (AgentState.PENDING, AgentState.STARTING) for row in rows),
            "capacity": sum(row.capacity for row in running),
            "sessions": sum(placed.get(row.agent_id, 0) for row in running),
        }
        where = "the pool" if agent_id is None else f"agent {agent_id}"
        return AtCapacity(
            f"{where} has no room for a session: {numbers['sessions']} of {numbers['capacity']} places are taken, "
            f"{numbers['agents_running']} agents run and {numbers['agents_starting']} are starting",
            details=numbers,
            retry_after=2 if numbers["agents_starting"] else 10,
        )


def _placement(endpoint: Endpoint, row: SessionRow, turn: int) -> Placement:
    return Placement(
        session_id=row.session_id,
        generation=row.generation,
        turn=turn,
        timeout=endpoint.timeout,
        options=SessionOptions.stored(row.options),
    )


def _check(session: SessionRow | None, request: ChatRequest, session_id: str, agent_id: str | None) -> SessionRow:
    known = session is not None and session.state != ENDED and session.user_id == request.user_id
    if session is None or not known or (agent_id is not None and session.agent_id != agent_id):
        raise NotFound(f"there is no session {session_id}")
    refuse_changes(request.options(), session.options)
    return session
