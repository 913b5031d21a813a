"""One session on this agent: its identity and options, its turn, its CLI, its files, its log, and its notices.

Invariants: at most one turn at a time; the CLI is parked only while the session has no turn. The states of the CLI are
in `cli_state.py`.
"""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

from claude_agent_sdk import HookMatcher

from hypercore_agents.agent.claude.context import AgentContext
from hypercore_agents.agent.claude.options import Offer, offer
from hypercore_agents.agent.claude.outcome import StopReason
from hypercore_agents.agent.claude.prewarmed import PrewarmedCli, PrewarmedClis
from hypercore_agents.agent.claude.process import ClaudeFailed, ClaudeProcess
from hypercore_agents.agent.isolation.backends import BackgroundProcesses
from hypercore_agents.agent.persistence.journal import Journal
from hypercore_agents.agent.persistence.transcript_mirror import TranscriptMirror
from hypercore_agents.agent.sessions.background_jobs import BackgroundJobs
from hypercore_agents.agent.sessions.cli import SessionCli
from hypercore_agents.agent.sessions.files import SessionFiles
from hypercore_agents.api.approvals import ApprovalRequest, ApprovalResolved
from hypercore_agents.api.chat import PlacedChatRequest, SessionOpening, SessionView, Usage
from hypercore_agents.api.errors import Unavailable
from hypercore_agents.api.internal import SessionToken


class RunningTurn(Protocol):
    """What a session needs of its turn (`turn.py`, which builds on this module)."""

    number: int
    admitted: bool

    def stop(self, reason: StopReason) -> bool:
        """End the turn soon, for this reason; return False when it is already ending."""
        ...

    def publish(self, event: ApprovalRequest | ApprovalResolved) -> None:
        """Add an event to the session's log and to the turn's stream."""
        ...


class Session:
    """A session placed on this agent.

    `on_stale` is called when the store has a newer placement of the session, `on_start_done` when a start of its CLI is
    done. `predecessor` is done when the session's earlier placement on this agent is removed.
    """

    def __init__(
        self,
        request: PlacedChatRequest | SessionOpening,
        context: AgentContext,
        prewarmed: PrewarmedClis,
        *,
        on_stale: Callable[["Session"], None],
        on_start_done: Callable[["Session"], None] = lambda _: None,
        predecessor: "asyncio.Future[bool] | None" = None,
    ) -> None:
        placement = request.placement
        self.session_id = placement.session_id
        self.user_id = request.user_id
        self.generation = placement.generation
        self.options = placement.options
        self.offer: Offer = offer(placement.options, context.configuration, separate=context.isolation.separate)
        self.opened_for_files = isinstance(request, SessionOpening)
        """Whether the session was placed here for a file request, before any turn."""
        self.turn: RunningTurn | None = None
        self.turns = 0
        self.usage = Usage()
        self.used_at = context.clock()
        self._context = context
        self._created_at = self._last_used_at = _now()
        self._notices: list[str] = []
        self.mirror = TranscriptMirror(
            self.session_id,
            self.generation,
            context.gateway,
            context.tasks,
            on_stale=lambda: on_stale(self),
            on_lost=context.metrics.mirror_errors.inc,
        )
        self.journal = Journal(self.generation, self.mirror.append_event)
        self.jobs = BackgroundJobs(
            self.options, context.isolation, publish=self.journal.publish, notify=self._notices.append
        )
        self.files = SessionFiles(
            self.session_id,
            context.isolation.folder(self.session_id, self.user_id),
            context,
            self.mirror,
            self._notices,
            needs_fetch=placement.turn > 1,
            predecessor=predecessor,
        )
        self.cli = SessionCli(
            self.session_id,
            self.user_id,
            self.options,
            self.offer,
            context,
            prewarmed,
            self.files,
            self.mirror,
            first_turn=placement.turn == 1,
            approvals=self._approval_hooks,
            on_killed=lambda: self.end_jobs("the session's Claude CLI ended"),
            on_start_done=lambda: self._start_done(on_start_done),
        )
        self.guard = self.cli.guard
        self.status = self.cli.status

    @property
    def process(self) -> ClaudeProcess | None:
        """The connected CLI, if there is one."""
        return self.status.process

    @property
    def has_ended(self) -> bool:
        """Whether the session has left this agent."""
        return self.status.has_ended

    @property
    def has_prewarmed(self) -> bool:
        """Whether a prewarmed CLI suits the session, so that its turn waits for no start."""
        return self.cli.has_prewarmed

    @property
    def is_unused(self) -> bool:
        """Whether another session can take over this session's CLI: neither the CLI nor the folder was used."""
        return not self.opened_for_files and self.cli.is_unused

    @property
    def is_untouched(self) -> bool:
        """Whether this agent has no state of the session that another agent lacks, so that another one may serve it."""
        return (
            self.turns == 0 and not self.opened_for_files and not self.files.touched and not self.files.archive.changed
        )

    def take_notices(self) -> list[str]:
        """Return the notices for the user's next answer, once."""
        notices = [*self._notices]
        self._notices.clear()
        return notices

    def set_token(self, token: SessionToken) -> None:
        """Use this credential from the next turn on; the first one carries the last event of the session's log."""
        self.cli.set_token(token)
        if (notice := self.journal.continue_after(token.last_event)) is not None:
            self._notices.append(notice)

    async def take_unused(self) -> PrewarmedCli | None:
        """Take the unused CLI out of this session; None when there is none."""
        return await self.cli.take_unused()

    async def fetch_files(self) -> None:
        """Fetch the files that another agent stored; does nothing once the session has ended.

        Raises Unavailable, and NotFound or StalePlacement when the session is no longer placed here.
        """
        async with self.guard:
            self.files.touched = True
            if not self.files.needs_fetch:
                return
            await self.files.wait_for_predecessor()
            if self.has_ended:
                return
            try:
                await self.files.fetch()
            except ClaudeFailed as error:
                raise Unavailable(error.message, retry_after=2) from None

    async def park(self, reason: str = "the session was parked") -> bool:
        """End the idle CLI gracefully; return False when a turn began first.

        `reason` is reported to the user if a background job ends with the CLI.
        """
        async with self.guard:
            if self.turn is not None:
                return False
            if self.process is not None:
                if self.jobs.running:
                    await self.check_processes()  # the job may have ended by itself
                self.end_jobs(reason)
                await self.cli.park()
                self.files.save_soon()
            return True

    async def kill(self) -> None:
        """Kill the CLI and everything it started."""
        async with self.guard:
            await self.cli.kill()

    async def recover_from_crash(self) -> None:
        """Kill the remaining processes of a CLI that ended during a turn, and record a job that ended with it."""
        if self.files.archive.may_be_written_late:
            await self.jobs.check_after_crash(self.process, self.files.folder)
        await self.kill()

    async def check_jobs(self) -> bool:
        """Return whether a background job runs. When it has ended, archive what it wrote."""
        if self.turn is not None or not self.jobs.running:  # a turn may hold the guard for long
            return self.jobs.running
        async with self.guard:
            if self.turn is not None or not self.jobs.running:
                return self.jobs.running
            if not self.status.is_running:
                await self.cli.kill()
            else:
                await self.check_processes()
                if self.jobs.running:
                    return True
            self.used_at = self._context.clock()
            self.files.save_soon()
            return False

    async def check_processes(self) -> BackgroundProcesses:
        """Return what runs besides the CLI, which may write files after the turn."""
        return await self.jobs.check(self.process, self.files.folder)

    async def check_jobs_before_interrupt(self) -> None:
        """Record a job that the turn started: it ends with the CLI if the interrupt does not end the turn."""
        if self.files.archive.may_be_written_late:
            await self.jobs.check_during_turn(self.process, self.files.folder)

    def end_jobs(self, reason: str) -> None:
        """Report that background jobs end, if any run."""
        self.jobs.ended(reason, between_turns=self.turn is None or not self.turn.admitted)

    def turn_ended(self, usage: Usage | None) -> None:
        """Count a turn that ended, and its cost."""
        self.turn = None
        self.turns += 1
        self.cli.expect_transcript()
        self.used_at = self._context.clock()
        self._last_used_at = _now()
        if usage is not None:
            self.usage = Usage(
                **{name: getattr(self.usage, name) + getattr(usage, name) for name in Usage.model_fields}
            )

    def leave(self) -> None:
        """Stop storing, starting and streaming for this session: it leaves this agent."""
        self.status.end()
        self.files.folder.released = True
        self.mirror.stop()
        self.journal.ring.close()

    def view(self) -> SessionView:
        """Return the session as its user sees it; `turns` and `usage` count the turns on this agent."""
        return SessionView(
            session_id=self.session_id,
            user_id=self.user_id,
            agent_id=self._context.agent_id,
            state="live" if self.status.is_running else "parked",
            turns=self.turns,
            running=self.turn is not None,
            created_at=self._created_at,
            last_used_at=self._last_used_at,
            usage=self.usage,
        )

    def _start_done(self, then: Callable[["Session"], None]) -> None:
        if self.turn is None:
            self.used_at = self._context.clock()
        then(self)

    def _approval_hooks(self) -> list[HookMatcher] | None:
        tools = self.options.approval_tools
        if not tools:
            return None
        return self._context.approvals.hooks(self.session_id, self.user_id, tools, self._publish_approval)

    def _publish_approval(self, event: ApprovalRequest | ApprovalResolved) -> None:
        if self.turn is not None:
            self.turn.publish(event)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
