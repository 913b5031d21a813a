"""The registry of this agent's sessions: places and removes sessions, begins turns, and counts what they use.

Invariants: at most `max_sessions` sessions are placed here, and at most one turn runs per session. A session whose
first turn was not admitted is removed again, and so is a session whose placement has moved on. A session that comes
back with a higher generation starts from the store's state, once its earlier placement is removed. After `close`, no
process of any session runs.
"""

import asyncio
import os
from collections.abc import Iterable

import structlog

from hypercore_agents.agent.claude.context import AgentContext
from hypercore_agents.agent.claude.options import check
from hypercore_agents.agent.claude.prewarmed import PrewarmedClis
from hypercore_agents.agent.claude.skills import check_skills
from hypercore_agents.agent.gateway.client import GatewayClient, StalePlacement, Unplaced
from hypercore_agents.agent.isolation.processes import private_memory_mb
from hypercore_agents.agent.scheduling.load import QueueWaits
from hypercore_agents.agent.sessions.capacity import LiveCapacity
from hypercore_agents.agent.sessions.parking import Parking, ParkingLimits
from hypercore_agents.agent.sessions.removal import SessionRemoval
from hypercore_agents.agent.sessions.send_buffer import SendBuffer
from hypercore_agents.agent.sessions.session import Session
from hypercore_agents.agent.sessions.shutdown import STORE_SECONDS, Shutdown
from hypercore_agents.agent.sessions.turn import Outcome, Turn, TurnContext
from hypercore_agents.api.chat import PlacedChatRequest, SessionOpening
from hypercore_agents.api.errors import AtCapacity, Conflict, NotFound, Unavailable
from hypercore_agents.api.events import SessionEvents
from hypercore_agents.observability.metrics import AgentMetrics
from hypercore_agents.observability.tracing import Span, Tracing

_log = structlog.get_logger(__name__)


class Sessions:
    """The registry. Methods raise domain errors."""

    def __init__(
        self,
        context: AgentContext,
        gateway: GatewayClient,
        metrics: AgentMetrics,
        *,
        live_limit: int,
        live_limit_of_user: int | None = None,
        prewarmed: int = 0,
        parking_limits: ParkingLimits | None = None,
        capacity_timeout: float,
        interrupt_grace: float,
        tracing: Tracing | None = None,
        log_content: bool = False,
    ) -> None:
        self.max_sessions = context.configuration.max_concurrent
        self.draining = False
        self.tasks = context.tasks
        self.waits = QueueWaits()
        self.start_limiter = context.start_limiter
        self.approvals = context.approvals
        self._queue_wait_seconds = metrics.queue_wait_seconds
        self._context = context
        self._sessions: dict[str, Session] = {}
        self.capacity = LiveCapacity(
            live_limit,
            per_user=live_limit_of_user,
            timeout=capacity_timeout,
            sessions=self._sessions.values,
            tasks=self.tasks,
            on_parked=metrics.parked.inc,
            on_wait=self._record_wait,
            start_limiter=context.start_limiter,
        )
        self._turn_context = TurnContext(
            context.agent_id,
            gateway,
            self.capacity,
            metrics,
            self.tasks,
            interrupt_grace,
            context.approvals,
            tracing,
            log_content,
        )
        self.capacity.reserve = prewarmed
        self.prewarmed = PrewarmedClis(context, prewarmed, self._slots_for_prewarmed, self.tasks)
        self._removal = SessionRemoval(context, self._sessions, self.capacity, self.prewarmed)
        self._shutdown = Shutdown(self._all, self.capacity, interrupt_grace)
        self._parking: Parking | None = None
        if parking_limits is not None:
            self._parking = Parking(parking_limits, self._sessions.values, self.capacity, clock=context.clock)
            self.tasks.repeat("park", self._park, every=parking_limits.interval())

    def begin(
        self, request: PlacedChatRequest, *, stream: bool, span: Span | None = None
    ) -> tuple[Turn, "asyncio.Task[Outcome]"]:
        """Begin a turn, and its session if it is the first one. Awaits nothing, so no other request can intervene.

        Raises Unavailable (draining), InvalidRequest, NotFound (another user's session), Conflict (a turn runs, other
        options, an old generation) or AtCapacity.
        """
        if self.draining:
            raise Unavailable("the agent is shutting down; try again")
        session = self._current(request)
        if session is None:
            session = self._place(request)
        else:
            _check_continues(session, request)
        turn = Turn(
            session,
            request,
            self._turn_context,
            send_buffer=SendBuffer() if stream else None,
            notices=[*session.offer.notices],
            span=span,
        )
        session.turn = turn
        return turn, self.tasks.start("turn", self._run(turn))

    def open(self, opening: SessionOpening) -> Session:
        """Place a session here without a turn. Raises as `begin` does, except that a running turn is no conflict."""
        session = self._current(opening)
        if session is None:
            if self.draining:
                raise Unavailable("the agent is shutting down; try again")
            return self._place(opening)
        if session.user_id != opening.user_id:
            raise NotFound("there is no such session on this agent")
        if opening.placement.generation < session.generation:
            raise StalePlacement("the session was placed again after this request was sent")
        return session

    async def open_with_files(self, opening: SessionOpening) -> Session:
        """Place a session here as `open` does, and fetch its files. Raises Unplaced if it is unplaced meanwhile."""
        session = self.open(opening)
        try:
            await session.fetch_files()
        except (NotFound, StalePlacement):  # from the gateway; the session exists, so the client must not get a 404
            _log.warning("session.moved_on", session_id=session.session_id, generation=session.generation)
            self._removal.remove_soon(session, "moved-on")
        if session.has_ended:
            raise Unplaced("the session is no longer on this agent; retry to place it again", retry_after=1)
        return session

    def get(self, session_id: str) -> Session:
        """Return a session. Raises NotFound."""
        session = self._sessions.get(session_id)
        if session is None:
            raise NotFound("there is no such session on this agent")
        return session

    async def events(self, session_id: str, after: str | None, limit: int) -> SessionEvents:
        """Return the session's log after an id, including the latest events. Raises NotFound or Unavailable."""
        session = self.get(session_id)
        await session.mirror.wait_until_stored(STORE_SECONDS)
        return await self._turn_context.gateway.events(session_id, session.generation, after, limit)

    def interrupt(self, session_id: str) -> bool:
        """Interrupt the session's turn; return False when none runs. Raises NotFound."""
        turn = self.get(session_id).turn
        return turn is not None and turn.stop("user")

    async def delete(self, session_id: str) -> list[str]:
        """Delete a session: its turn, its processes, its files. Returns notices for its user. Raises NotFound."""
        session = self.get(session_id)
        await session.check_jobs()
        session.jobs.ended("the session was deleted", between_turns=False)
        notices = session.take_notices()  # also of a parking that has just ended: no later answer can report it
        if session.is_unused and session.turn is None and self.prewarmed.target > 0:
            self._removal.reuse_cli_soon(session)
        else:
            await self._removal.remove(session)
        return notices

    async def release(self, session_id: str) -> None:
        """Remove an idle session that is stored completely, so that any agent can take it over.

        Its CLI ends first, and the files that background jobs wrote are archived. Raises NotFound, and Conflict while
        the session is busy (with a turn, a background job, or a file that is read or changed) or not stored completely.
        """
        session = self.get(session_id)
        _require_no_transfer(session)
        archive, details = session.files.archive, {"session_id": session_id}
        if await session.check_jobs():
            raise Conflict("a background process of the session still runs", details=details)
        if session.turn is None and archive.changed:
            if session.status.holds_slot:
                await self.capacity.park(session, "the session was released from its agent")
            await session.files.save()
        if session.turn is None:
            await session.mirror.wait_until_stored(STORE_SECONDS)
        if session.turn is not None or session.has_ended:
            raise Conflict("the session runs a turn", details=details)
        if archive.changed or not session.mirror.is_stored:
            raise Conflict("the session is not stored completely", details=details)
        _require_no_transfer(session)
        await self._removal.remove(session)

    def counts(self) -> tuple[int, int, int]:
        """Return how many sessions are placed here, live and in a turn."""
        sessions = self._sessions.values()
        live = sum(1 for session in sessions if session.status.is_running)
        return len(sessions), live, sum(1 for session in sessions if session.turn is not None)

    def pids(self) -> list[int]:
        """Return the PIDs of the live CLIs, including prewarmed ones."""
        pids = (session.process.pid for session in self._sessions.values() if session.process is not None)
        return [*(pid for pid in pids if pid is not None), *self.prewarmed.pids()]

    def memory_mb(self) -> float:
        """Return the private memory of the live CLIs, in MB."""
        return sum(map(private_memory_mb, self.pids()))

    async def drain(self, grace: float) -> None:
        """Accept no new turns and give running ones `grace` seconds; then interrupt them and store what changed."""
        self.draining = True
        await self._shutdown.drain(grace)

    async def close(self) -> None:
        """Kill every process of every session, then end the background tasks."""
        self.draining = True
        await self.prewarmed.end()
        await self._shutdown.kill_all()
        await self.tasks.close()

    def _all(self) -> Iterable[Session]:
        return list(self._sessions.values())

    def _slots_for_prewarmed(self) -> int:
        if self.draining or self.capacity.waiting or (self._parking is not None and self._parking.memory_is_short):
            return 0
        # Idle sessions are parked for prewarmed CLIs, so they do not count; sessions with a job are not, so they do.
        sessions = [s for s in self._sessions.values() if s.status.holds_slot]
        return self.capacity.limit - sum(1 for s in sessions if s.turn or s.status.is_starting or s.jobs.running)

    def _start_done(self, session: Session) -> None:
        """Release the slot of a session whose start failed after its turn had given up."""
        if session.turn is None:
            if session.process is None:
                self.capacity.release(session)
            else:
                self.capacity.notify_change()

    async def _park(self) -> None:
        assert self._parking is not None
        await self._parking.run()
        self.prewarmed.refresh()

    def _record_wait(self, seconds: float) -> None:
        self._queue_wait_seconds.observe(seconds)
        self.waits.add(seconds)

    def _current(self, request: PlacedChatRequest | SessionOpening) -> Session | None:
        """Return the session; None if it is not here, or if its state here is outdated."""
        placement = request.placement
        session = self._sessions.get(placement.session_id)
        if session is not None and session.user_id == request.user_id and placement.generation > session.generation:
            # It was on another agent meanwhile, so its state here is outdated.
            _log.warning("session.returned", session_id=session.session_id, generation=placement.generation)
            self._removal.remove_soon(session, "outdated")
            return None
        return session

    def _place(self, request: PlacedChatRequest | SessionOpening) -> Session:
        options = request.placement.options
        check(options, as_root=os.geteuid() == 0 and not self._context.isolation.separate)
        check_skills(options.skills or (), self._context.skills)
        if len(self._sessions) >= self.max_sessions:
            raise AtCapacity(
                f"this agent holds {self.max_sessions} sessions and accepts no more",
                details={"sessions": len(self._sessions), "capacity": self.max_sessions},
            )
        session = Session(
            request,
            self._context,
            self.prewarmed,
            on_stale=self._moved_on,
            on_start_done=self._start_done,
            predecessor=self._removal.in_progress.get(request.placement.session_id),
        )
        self._sessions[session.session_id] = session
        return session

    async def _run(self, turn: Turn) -> Outcome:
        session = turn.session
        outcome: Outcome | None = None
        try:
            outcome = await turn.run()
        finally:
            turn.record_outcome(outcome)
        if isinstance(outcome, StalePlacement | Unplaced):
            _log.warning("session.moved_on", session_id=session.session_id, generation=session.generation)
            await self._removal.remove(session)
        elif not turn.admitted and session.turns == 1 and not session.opened_for_files and not session.has_ended:
            await self._removal.remove(session)
        return outcome

    def _moved_on(self, session: Session) -> None:
        _log.warning("session.moved_on", session_id=session.session_id, generation=session.generation)
        # in a task of its own: the caller is the mirror's sender, which the removal cancels
        self.tasks.start("moved-on", self._remove(session))

    async def _remove(self, session: Session) -> None:
        await self._removal.remove(session)


def _require_no_transfer(session: Session) -> None:
    if session.files.transfers:  # an archive that is made now may hold a file without its end
        raise Conflict("a file of the session is being read or changed", details={"session_id": session.session_id})


def _check_continues(session: Session, request: PlacedChatRequest) -> None:
    placement = request.placement
    if session.user_id != request.user_id:
        raise NotFound("there is no such session on this agent")
    if placement.generation < session.generation:
        raise StalePlacement("the session was placed again after this turn was sent")
    if session.turn is not None:
        raise Conflict(
            "the session runs another turn; wait for its end or interrupt it",
            details={"session_id": session.session_id, "turn": session.turn.number},
        )
    if placement.options != session.options:
        raise Conflict("a session's options cannot change after its first turn; start a new session for other options")
