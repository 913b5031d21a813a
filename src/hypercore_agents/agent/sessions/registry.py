"""The sessions of this agent: who is placed here, what runs, and how all of it ends.

Invariants: at most `capacity` sessions are placed; at most one turn runs per session; a session whose first
turn was not even admitted is forgotten again; a session whose placement moved on is ended here; one that comes back
with a higher generation begins anew from what the store has, once nothing of its earlier stay is left. After `close` no
process of any session is left.
"""

import asyncio
import contextlib
import os
from collections.abc import Coroutine
from typing import Any

import structlog

from hypercore_agents.agent.claude.context import AgentContext
from hypercore_agents.agent.claude.options import check
from hypercore_agents.agent.claude.outcome import StopReason
from hypercore_agents.agent.claude.prewarmed import PrewarmedClis
from hypercore_agents.agent.claude.skills import check_skills
from hypercore_agents.agent.gateway.client import Gateway, StalePlacement, Unplaced
from hypercore_agents.agent.isolation.processes import private_memory_mb
from hypercore_agents.agent.scheduling.load import QueueWaits
from hypercore_agents.agent.sessions.capacity import LiveCapacity
from hypercore_agents.agent.sessions.parking import Parking, Policy
from hypercore_agents.agent.sessions.send_buffer import SendBuffer
from hypercore_agents.agent.sessions.session import Session
from hypercore_agents.agent.sessions.turn import Conduct, Turn
from hypercore_agents.api.chat import ChatResponse, PlacedChatRequest, SessionOpening
from hypercore_agents.api.errors import AtCapacity, Conflict, HypercoreError, NotFound, Unavailable
from hypercore_agents.api.events import SessionEvents
from hypercore_agents.observability.metrics import AgentMetrics
from hypercore_agents.observability.tracing import Span, Tracing

_log = structlog.get_logger(__name__)
_CLOSERS = 8
_LAST_ARCHIVES_SECONDS = 8.0
_SHUT_DOWN = "its agent was shut down"
RELEASE_SECONDS = 2.0
"""How long a release waits for the last events to be stored."""


class Sessions:
    """The registry. Methods raise domain errors."""

    def __init__(
        self,
        context: AgentContext,
        gateway: Gateway,
        metrics: AgentMetrics,
        *,
        live_limit: int,
        live_limit_of_user: int | None = None,
        prewarmed: int = 0,
        policy: Policy | None = None,
        room_timeout: float,
        interrupt_grace: float,
        tracing: Tracing | None = None,
        log_content: bool = False,
    ) -> None:
        self.capacity = context.configuration.max_concurrent
        self.draining = False
        self.tasks = context.tasks
        self.waits = QueueWaits()
        self.start_limiter = context.start_limiter
        self._queue_wait_seconds = metrics.queue_wait_seconds
        self._context = context
        self._sessions: dict[str, Session] = {}
        self._ending: dict[str, asyncio.Future[bool]] = {}
        self.room = LiveCapacity(
            live_limit,
            per_user=live_limit_of_user,
            timeout=room_timeout,
            sessions=self._sessions.values,
            tasks=self.tasks,
            on_parked=metrics.parked.inc,
            on_wait=self._waited,
            start_limiter=context.start_limiter,
        )
        self._conduct = Conduct(
            context.agent_id,
            gateway,
            self.room,
            metrics,
            self.tasks,
            interrupt_grace,
            context.approvals,
            tracing,
            log_content,
        )
        self.approvals = context.approvals
        self.room.reserve = prewarmed
        self.prewarmed = PrewarmedClis(context, prewarmed, self._places_for_spares, self.tasks)
        self._keeper = (
            Parking(policy, self._sessions.values, self.room, clock=context.clock) if policy is not None else None
        )
        if policy is not None:
            self.tasks.keep("park", self._keep, every=policy.every())

    def begin(
        self, request: PlacedChatRequest, *, stream: bool, span: Span | None = None
    ) -> tuple[Turn, "asyncio.Task[Outcome]"]:
        """Begin a turn, and the session with its first; nothing is awaited, so nothing comes between check and claim.

        Raises Unavailable (draining), InvalidRequest, NotFound (another user's), Conflict (a turn runs, other options,
        an old generation) or AtCapacity.
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
            self._conduct,
            frames=SendBuffer() if stream else None,
            notices=[*session.offer.notices],
            span=span,
        )
        session.turn = turn
        return turn, self.tasks.start("turn", self._carry_out(turn))

    def open(self, opening: SessionOpening) -> Session:
        """Hold a session though no turn begins. Raises as `begin`, but for a turn that runs: that is no hindrance."""
        session = self._current(opening)
        if session is None:
            if self.draining:
                raise Unavailable("the agent is shutting down; try again")
            return self._place(opening)
        if session.user_id != opening.user_id:
            raise NotFound("there is no such session on this agent")
        if opening.placement.generation < session.generation:
            raise StalePlacement("the session was placed anew since this was asked")
        return session

    async def bring_here(self, opening: SessionOpening) -> Session:
        """Hold a session as `open` does, and have its files here. Raises Unplaced where it lost its place meanwhile."""
        session = self.open(opening)
        try:
            await session.present()
        except (NotFound, StalePlacement):  # by the gateway: it would stay here for nothing, and is not unknown
            _log.warning("session.moved_on", session_id=session.session_id, generation=session.generation)
            self.tasks.start("moved-on", self._let_go(session, "deleted"))
        if session.ended:
            raise Unplaced("the session lost its place on this agent; try again: it is placed anew", retry_after=1)
        return session

    def get(self, session_id: str) -> Session:
        """Return a session. Raises NotFound."""
        session = self._sessions.get(session_id)
        if session is None:
            raise NotFound("there is no such session on this agent")
        return session

    async def events(self, session_id: str, after: str | None, limit: int) -> SessionEvents:
        """Return the session's log after an id, what was just told included. Raises NotFound or Unavailable."""
        session = self.get(session_id)
        await session.mirror.settled(RELEASE_SECONDS)
        return await self._conduct.gateway.events(session_id, session.generation, after, limit)

    def interrupt(self, session_id: str) -> bool:
        """Interrupt the session's turn; False when none ran. Raises NotFound."""
        turn = self.get(session_id).turn
        return turn is not None and turn.stop("asked")

    async def delete(self, session_id: str) -> list[str]:
        """End a session: its turn, its processes, its files; return what its user should know. Raises NotFound."""
        session = self.get(session_id)
        await session.look_at_jobs()
        session.jobs.ended("the session was deleted", aloud=False)
        notices = session.take_notices()  # what a parking a moment ago has ended is said by nobody else
        if session.starts_unused and session.turn is None and self.prewarmed.target > 0:
            self.tasks.start("reuse", self._reuse(session, self._forget(session)))
        else:
            await self._end(session, "deleted")
        return notices

    async def release(self, session_id: str) -> None:
        """Let go of an idle session that is kept outside as a whole, so that any agent can take it up.

        Its CLI ends first, and what ran beside it wrote is kept. Raises NotFound, and Conflict while it is busy (with a
        turn, with what one left running, or with a file that is read or changed) or something of it is only here.
        """
        session = self.get(session_id)
        self._require_no_transfer(session)
        if await session.look_at_jobs():
            raise Conflict("something that a turn left running still runs", details={"session_id": session_id})
        if session.turn is None and session.archive.changed:
            if session.resident:
                await self.room.park(session, "the session gave its place back")
            await session.keep_files()
        if session.turn is None:
            await session.mirror.settled(RELEASE_SECONDS)
        if session.turn is not None or session.ended:
            raise Conflict("the session runs a turn", details={"session_id": session_id})
        if session.archive.changed or not session.mirror.kept:
            raise Conflict("the session is not kept outside as a whole", details={"session_id": session_id})
        self._require_no_transfer(session)
        await self._end(session, "deleted")

    def _require_no_transfer(self, session: Session) -> None:
        if session.transfers:  # an archive that is made now may have a file without its end
            raise Conflict("a file of the session is being read or changed", details={"session_id": session.session_id})

    def counts(self) -> tuple[int, int, int]:
        """Return how many sessions are placed, live and in a turn."""
        sessions = self._sessions.values()
        live = sum(1 for session in sessions if session.process is not None and session.process.alive)
        return len(sessions), live, sum(1 for session in sessions if session.turn is not None)

    def pids(self) -> list[int]:
        """Return the pids of the live CLIs, prewarmed CLIs included."""
        found = (session.process.pid for session in self._sessions.values() if session.process is not None)
        return [*(pid for pid in found if pid is not None), *self.prewarmed.pids()]

    def memory_mb(self) -> float:
        """Return the private memory of the live CLIs, MB."""
        return sum(map(private_memory_mb, self.pids()))

    async def drain(self, grace: float) -> None:
        """Take no new turns, give running ones `grace` seconds, then interrupt them and wait until they ended; end what
        they left running, and keep what changed in workspaces since their last archive, as far as there is time."""
        self.draining = True
        if not await self._idle(grace):
            for session in list(self._sessions.values()):
                if session.turn is not None:
                    session.turn.stop("draining")
            await self._idle(2 * self._conduct.interrupt_grace)
        enders = asyncio.Semaphore(_CLOSERS)

        async def end_job(session: Session) -> None:
            while session.turn is not None:  # it is closing; what it leaves is not known yet
                await self.room.wait_for_change()
            if session.jobs.running:
                async with enders:
                    await self.room.park(session, _SHUT_DOWN)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_ARCHIVES_SECONDS):
                busy = [s for s in self._sessions.values() if s.jobs.running or s.turn is not None]
                await asyncio.gather(*map(end_job, busy))
                changed = [session for session in self._sessions.values() if session.archive.changed]
                await asyncio.gather(*(session.keep_files() for session in changed))
        for session in self._sessions.values():
            session.end_job_of_closing_turn(_SHUT_DOWN)
        await self._settle()

    async def close(self) -> None:
        """Kill every process of every session; then end what still runs in the background."""
        self.draining = True
        closers = asyncio.Semaphore(_CLOSERS)

        async def close(session: Session) -> None:
            async with closers:
                if session.turn is not None:
                    session.turn.stop("draining")
                session.abort_start()
                await session.kill()

        await self.prewarmed.end()
        results = await asyncio.gather(*map(close, self._sessions.values()), return_exceptions=True)
        for failed in (result for result in results if isinstance(result, Exception)):
            _log.error("session.not_closed", exc_info=failed)
        await self.tasks.close()

    def _places_for_spares(self) -> int:
        if self.draining or self.room.waiting or (self._keeper is not None and self._keeper.over):
            return 0
        # Idle sessions make way, so they do not count; one with a job does not for a spare.
        busy = (s.turn or s.is_starting or s.jobs.running for s in self._sessions.values() if s.resident)
        return self.room.limit - sum(map(bool, busy))

    def _start_over(self, session: Session) -> None:
        """Give the place back of a session whose start failed after its turn had given up."""
        if session.turn is None:
            if session.process is None:
                self.room.leave(session)
            else:
                self.room.changed()

    async def _settle(self) -> None:
        """Wait a little until what sessions told last is stored."""
        await asyncio.gather(*(session.mirror.settled(RELEASE_SECONDS) for session in self._sessions.values()))

    async def _keep(self) -> None:
        assert self._keeper is not None
        await self._keeper.look()
        self.prewarmed.refresh()

    def _waited(self, seconds: float) -> None:
        self._queue_wait_seconds.observe(seconds)
        self.waits.add(seconds)

    def _current(self, request: PlacedChatRequest | SessionOpening) -> Session | None:
        """Return the session as it is here, None for one that is not, or that was elsewhere meanwhile."""
        placement = request.placement
        session = self._sessions.get(placement.session_id)
        if session is not None and session.user_id == request.user_id and placement.generation > session.generation:
            # It was elsewhere meanwhile, so what is here is outdated.
            _log.warning("session.came_back", session_id=session.session_id, generation=placement.generation)
            self.tasks.start("outdated", self._let_go(session, "deleted"))
            return None
        return session

    def _place(self, request: PlacedChatRequest | SessionOpening) -> Session:
        options = request.placement.options
        check(options, as_root=os.geteuid() == 0 and not self._context.isolation.separate)
        check_skills(options.skills or (), self._context.skills)
        if len(self._sessions) >= self.capacity:
            raise AtCapacity(
                f"this agent holds {self.capacity} sessions and takes no more",
                details={"sessions": len(self._sessions), "capacity": self.capacity},
            )
        session = Session(
            request,
            self._context,
            self.prewarmed,
            self._moved_on,
            on_started=self._start_over,
            after=self._ending.get(request.placement.session_id),
        )
        self._sessions[session.session_id] = session
        return session

    async def _carry_out(self, turn: Turn) -> "Outcome":
        session = turn.session
        outcome: Outcome | None = None
        try:
            outcome = await turn.run()
        finally:
            turn.told(outcome)
        if isinstance(outcome, StalePlacement | Unplaced):
            _log.warning("session.moved_on", session_id=session.session_id, generation=session.generation)
            await self._end(session, "deleted")
        elif not turn.admitted and session.turns == 1 and not session.opened and not session.ended:
            await self._end(session, "deleted")
        return outcome

    def _moved_on(self, session: Session) -> None:
        _log.warning("session.moved_on", session_id=session.session_id, generation=session.generation)
        self.tasks.start("moved-on", self._end(session, "deleted"))

    async def _reuse(self, session: Session, gone: "asyncio.Future[bool]") -> None:
        """Keep the CLI of a session that is over as a spare: it was paid for, and never used."""
        try:
            spare = await session.take_unused()
            self.room.leave(session)
            if spare is not None:
                await self.prewarmed.adopt(spare)
        except HypercoreError as error:
            spare = None
            _log.warning("session.cli_not_reused", session_id=session.session_id, error=error.message)
        if spare is None:
            await self._remove(session, None, gone)
        else:
            self._settle_gone(session, gone, True)

    async def _end(self, session: Session, reason: StopReason) -> None:
        await self._let_go(session, reason)

    def _let_go(self, session: Session, reason: StopReason) -> Coroutine[Any, Any, None]:
        """Forget a session now; what is returned ends all that it has, and must be carried out."""
        before = self._ending.get(session.session_id)
        if session.ended:  # and another one may have its id by now
            return _waited_for(before)
        gone = self._forget(session)
        if session.turn is not None:
            session.turn.stop(reason)
        session.abort_start()
        return self._remove(session, before, gone)

    def _forget(self, session: Session) -> "asyncio.Future[bool]":
        """Take a session out of the registry; the future says when nothing of it is left here."""
        gone: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._ending[session.session_id] = gone
        session.ended = session.folder.released = True
        session.mirror.stop()
        session.journal.ring.close()
        self.approvals.forget(session.session_id)
        if self._sessions.get(session.session_id) is session:
            del self._sessions[session.session_id]
        return gone

    async def _remove(
        self, session: Session, before: "asyncio.Future[bool] | None", gone: "asyncio.Future[bool]"
    ) -> None:
        removed = False
        try:
            await _waited_for(before)
            await session.kill()
            self.room.leave(session)
            await self._context.isolation.remove(session.folder)
            removed = True
        finally:
            self._settle_gone(session, gone, removed)

    def _settle_gone(self, session: Session, gone: "asyncio.Future[bool]", removed: bool) -> None:
        gone.set_result(removed)
        if self._ending.get(session.session_id) is gone:
            del self._ending[session.session_id]

    async def _idle(self, seconds: float) -> bool:
        """Wait until no turn runs; False when that took longer than `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while any(session.turn is not None for session in self._sessions.values()):
                    await self.room.wait_for_change()
        except TimeoutError:
            return False
        return True


Outcome = ChatResponse | HypercoreError


async def _waited_for(future: "asyncio.Future[bool] | None") -> None:
    if future is not None:
        await asyncio.wait((future,))


def _check_continues(session: Session, request: PlacedChatRequest) -> None:
    placement = request.placement
    if session.user_id != request.user_id:
        raise NotFound("there is no such session on this agent")
    if placement.generation < session.generation:
        raise StalePlacement("the session was placed anew since this turn was sent")
    if session.turn is not None:
        raise Conflict(
            "the session runs another turn; wait for its end or interrupt it",
            details={"session_id": session.session_id, "turn": session.turn.number},
        )
    if placement.options != session.options:
        raise Conflict("the session's options are frozen since its first turn; start a new session for others")
