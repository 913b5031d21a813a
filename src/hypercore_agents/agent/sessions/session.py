"""One session inside an agent: its folder, its options, its credential, and its CLI while it is live.

Invariants: at most one process and one turn; whoever starts, parks or kills the process holds `guard`; a session is
parked only while it has no turn. `resident` says that the session occupies a place among the live ones, which it does
from before its process starts until that process is gone.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import structlog
from claude_agent_sdk import HookMatcher

from hypercore_agents.agent.claude.context import AgentContext
from hypercore_agents.agent.claude.options import Offer, offer
from hypercore_agents.agent.claude.prewarmed import PrewarmedCli, PrewarmedClis
from hypercore_agents.agent.claude.process import ClaudeEnded, ClaudeFailed, ClaudeLimited, ClaudeProcess
from hypercore_agents.agent.claude.start import start
from hypercore_agents.agent.isolation.backends import BackgroundProcesses
from hypercore_agents.agent.isolation.disk_space import disk_full_reason
from hypercore_agents.agent.launcher.client import LaunchFailed, LimitReached
from hypercore_agents.agent.persistence.journal import Journal
from hypercore_agents.agent.persistence.transcript import TranscriptMirror, TranscriptPort
from hypercore_agents.agent.persistence.workspace_archive import WorkspaceArchive
from hypercore_agents.agent.sessions.background_jobs import BackgroundJobs
from hypercore_agents.agent.sessions.restore import SessionRestore
from hypercore_agents.api.approvals import ApprovalRequest, ApprovalResolved
from hypercore_agents.api.chat import PlacedChatRequest, SessionOpening, SessionView, Usage
from hypercore_agents.api.errors import HypercoreError, Unavailable
from hypercore_agents.api.internal import SessionToken

if TYPE_CHECKING:
    from hypercore_agents.agent.sessions.turn import Turn

_log = structlog.get_logger(__name__)
TOKEN_MARGIN_SECONDS = 60.0
"""A session token must outlive the turn that it serves by this much."""


class Session:
    """A session placed on this agent."""

    def __init__(
        self,
        request: PlacedChatRequest | SessionOpening,
        context: AgentContext,
        prewarmed: PrewarmedClis,
        on_stale: Callable[["Session"], None],
        *,
        on_started: Callable[["Session"], None] = lambda _: None,
        after: "asyncio.Future[bool] | None" = None,
    ) -> None:
        placement = request.placement
        self.session_id = placement.session_id
        self.user_id = request.user_id
        self.generation = placement.generation
        self.options = placement.options
        self.offer: Offer = offer(placement.options, context.configuration, separate=context.isolation.separate)
        self.folder = context.isolation.folder(placement.session_id, request.user_id)
        self.guard = asyncio.Lock()
        self.turn: Turn | None = None
        self.process: ClaudeProcess | None = None
        self.starting: ClaudeProcess | None = None
        self._start_under_way: asyncio.Task[Any] | None = None
        self._resumed: bool | None = None
        self._on_started = on_started
        self.resident = False
        self.ended = False
        self.opened = isinstance(request, SessionOpening)
        """Whether it came here for its files, before any turn."""
        self._files_touched = False
        """Whether somebody may have listed, read or written its files: from then on its folder is nobody else's."""
        self.transfers = 0
        """Requests that read or change a file now."""
        self.turns = 0
        self.usage = Usage()
        self.used_at = context.clock()
        self.mirror = TranscriptMirror(
            self.session_id,
            self.generation,
            context.gateway,
            context.tasks,
            on_stale=lambda: on_stale(self),
            on_lost=context.metrics.mirror_errors.inc,
        )
        self.archive = WorkspaceArchive(
            self.session_id,
            self.folder,
            context.isolation,
            context.gateway,
            context.tasks,
            limit=context.workspace_bytes,
            entries=context.workspace_files,
        )
        self._came_from_elsewhere = placement.turn > 1
        self._port = TranscriptPort(self.mirror)
        self._after = after
        self._notices: list[str] = []
        self._history = SessionRestore(
            self.session_id, self.archive, self.mirror, context.isolation, context.gateway, self._notices
        )
        self._context = context
        self._prewarmed = prewarmed
        self._fresh = request.placement.turn == 1
        self._token: SessionToken | None = None
        self._token_in_use: str | None = None
        self.journal = Journal(self.generation, self.mirror.tell)
        self.jobs = BackgroundJobs(self.options, say=self.journal.say, note=self._notices.append)
        self._created_at = self._last_used_at = _now()

    @contextlib.contextmanager
    def transferring(self) -> Iterator[None]:
        """Count a request that reads or changes a file until the end of the block."""
        self.transfers += 1
        try:
            yield
        finally:
            self.transfers -= 1

    def take_notices(self) -> list[str]:
        """Return, once, what a user should know of how the session was brought back."""
        notices = [*self._notices]
        self._notices.clear()
        return notices

    def needs_token(self, timeout: float) -> bool:
        """Say whether the credential would not outlive a turn of `timeout` seconds."""
        return self._token is None or self._token.expires_at - time.time() < timeout + TOKEN_MARGIN_SECONDS

    def give_token(self, token: SessionToken) -> None:
        """Use this credential from the next turn on; the first one says where the session's log ends."""
        self._token = token
        if (lost := self.journal.goes_on(token.last_event)) is not None:
            self._notices.append(lost)

    @property
    def is_live(self) -> bool:
        """Whether the session has a CLI, or one that starts."""
        return self.is_starting or (self.process is not None and self.process.alive)

    @property
    def has_spare(self) -> bool:
        """Whether a connected CLI waits that this session could take, so that its turn waits for no start."""
        return self._fresh and not self._files_touched and self._prewarmed.has(self.options)

    @property
    def is_starting(self) -> bool:
        """Whether a CLI is being started for this session, with or without a turn that waits for it."""
        return self._start_under_way is not None

    async def live(self, *, timeout: float) -> ClaudeProcess:
        """Return the session's connected CLI with a valid credential, started or resumed if need be.

        `timeout` is the turn's, in seconds. Raises ClaudeFailed or Unavailable; then the session has no process. A
        start that has begun goes on when this is cancelled: the session's next turn finds its CLI live.
        """
        if self._start_under_way is not None:  # of a turn that gave up
            await asyncio.wait((self._start_under_way,))
        async with self.guard:
            if (process := await self._renewed()) is not None:
                return process
        starting = self._context.tasks.start("live", self._try_live(timeout))
        self._start_under_way = starting
        starting.add_done_callback(self._started)
        try:
            result = await asyncio.shield(starting)
        except asyncio.CancelledError:
            if self.starting is None and not starting.done():
                starting.cancel()  # it only waited for its place, so nothing is lost
                await asyncio.wait((starting,))
            elif not self.ended:
                _log.info("session.start_goes_on", session_id=self.session_id)
            raise
        if isinstance(result, HypercoreError):
            raise result
        return result

    def _started(self, starting: "asyncio.Task[Any]") -> None:
        self._start_under_way = None
        if self.turn is None:
            self.used_at = self._context.clock()
        self._on_started(self)

    async def _try_live(self, timeout: float) -> "ClaudeProcess | HypercoreError":
        try:
            return await self._go_live(timeout)
        except HypercoreError as error:  # nobody may wait for it any more, and then it is no defect of ours
            return error

    async def _go_live(self, timeout: float) -> ClaudeProcess:
        async with self.guard:
            await self._kill()
            await self._follow()
            self.process = await self._start(timeout)
            return self.process

    async def _renewed(self) -> ClaudeProcess | None:
        """Return the session's CLI with its latest credential; None when there is none, or none that listens."""
        if self.process is None or not self.process.alive:
            return None
        try:
            await self._renew(self.process)
        except ClaudeFailed as error:
            _log.warning("session.renewal_failed", session_id=self.session_id, error=error.message)
            return None
        return self.process

    @property
    def starts_unused(self) -> bool:
        """Whether all that the session has is a new CLI, started or starting, that was never given anything of it."""
        process = self.starting or self.process
        return (
            process is not None
            and not process.prompted
            and self._resumed is False
            and not self.opened
            and not self._files_touched
            and not self.archive.changed
            and not self.options.approval_tools
            and not self.options.mcp_servers
            and self._context.isolation.separate
        )

    @property
    def is_untouched(self) -> bool:
        """Whether nothing of the session came into being on this agent, so that another agent may serve it instead."""
        return self.turns == 0 and not self.opened and not self._files_touched and not self.archive.changed

    async def take_unused(self) -> PrewarmedCli | None:
        """Wait for the start's end; return the unused CLI, which is not this session's any more. None: it failed."""
        if self._start_under_way is not None:
            await asyncio.wait((self._start_under_way,))
        async with self.guard:
            process = self.process
            if process is None or not process.alive or process.prompted or not self._port.withdraw():
                return None
            self.process = None
            process.set_session_id("")
            await process.renew_credential("")
            return PrewarmedCli(self.options, replace(self.folder, released=False), process, self._port)

    async def present(self) -> None:
        """Have the session's files here, also those that another agent left; nothing is done once it has ended.

        Raises Unavailable, and NotFound or StalePlacement where it is not placed here any more.
        """
        async with self.guard:
            self._files_touched = True
            if not self._came_from_elsewhere:
                return
            await self._follow()
            if self.ended:
                return
            await self._context.isolation.prepare(self.folder)
            try:
                await self._bring()
            except ClaudeFailed as error:
                raise Unavailable(error.message, retry_after=2) from None

    async def park(self, why: str = "the session was parked") -> bool:
        """End the idle CLI in good order; False when a turn came first. The next turn resumes from the transcript.

        `why` is told to the user where it ends a job.
        """
        async with self.guard:
            if self.turn is not None:
                return False
            if self.process is not None:
                if self.jobs.running:
                    await self.background_processes()  # it may have ended by itself
                self.jobs.ended(why, aloud=self._is_quiet())
                await self.process.park()  # where that is cut off, `kill` still finds the process
                self.process = None
                _log.info("session.parked", session_id=self.session_id)
                self._keep_files_soon()
            return True

    async def look_at_jobs(self) -> bool:
        """Say whether something that a turn left running still runs; once it has ended, what it wrote is archived."""
        if self.turn is not None or not self.jobs.running:  # a turn may hold the guard for long
            return self.jobs.running
        async with self.guard:
            if self.turn is not None or not self.jobs.running:
                return self.jobs.running
            if self.process is None or not self.process.alive:
                await self._kill()
            else:
                await self.background_processes()
                if self.jobs.running:
                    return True
            self.used_at = self._context.clock()
            self._keep_files_soon()
            return False

    async def background_processes(self) -> BackgroundProcesses:
        """Look at what of the session runs besides its CLI: it may write after the turn."""
        process = self.process
        if process is None or process.pid is None or not process.alive:
            return BackgroundProcesses(False, False)
        background = await self._context.isolation.background_processes(self.folder, process.pid)
        self.jobs.saw(background)
        return background

    async def limit_reached(self) -> str | None:
        """Say which limit the session reached since this was last asked, None when none."""
        try:
            return await self._context.isolation.limit_reached(self.folder)
        except LaunchFailed:
            return None

    async def look_in_turn(self) -> None:
        """Note what a tool let go of, before its turn's end: should the CLI have to be killed, that goes with it."""
        process = self.process
        if self.archive.restless and process is not None and process.pid is not None and process.alive:
            background = await self._context.isolation.background_processes(self.folder, process.pid)
            self.jobs.saw(BackgroundProcesses(False, background.detached))  # its descendants are tools that still run

    def _keep_files_soon(self) -> None:
        if self.archive.changed:
            self._context.tasks.start("keep-files", self.keep_files())

    def _is_quiet(self) -> bool:  # what is said now stands between turns in the log
        return self.turn is None or not self.turn.admitted

    async def keep_files(self, seconds: float | None = None) -> bool:
        """Archive the workspace as `save_files` does; return whether it is kept."""
        return await self.save_files(seconds) is None

    async def save_files(self, seconds: float | None = None) -> str | None:
        """Archive the workspace if something may have changed it since its last archive; return what is not kept, in
        words, None when everything is.

        `seconds` bounds how long that may take.
        """
        why: str | None
        try:
            async with asyncio.timeout(seconds):
                why = (await self.archive.save(self.generation, unless_unchanged=True)).missing
        except TimeoutError:
            why = f"the workspace is not archived yet: this takes more than {seconds or 0:.0f} s and goes on"
        except (HypercoreError, OSError) as error:
            why = f"the workspace is not archived: {str(error)[:300]}"
        if why is not None:
            _log.warning("session.files_not_kept", session_id=self.session_id, error=why)
        return why

    async def kill(self) -> None:
        """Kill the CLI and everything it started."""
        async with self.guard:
            await self._kill()

    async def crashed(self) -> None:
        """Kill what is left of a CLI that ended in mid-turn; a job that this turn began ended with it."""
        if self.archive.restless and self._context.isolation.separate:  # its namespace ended with it, jobs and all
            self.jobs.ended_unseen("the session's Claude CLI ended in mid-turn")
        elif self.archive.restless and self.process is not None and self.process.pid is not None:
            self.jobs.saw(await self._context.isolation.background_processes(self.folder, self.process.pid))
        await self.kill()

    def end_job_of_closing_turn(self, why: str) -> None:
        """Tell of a job that ends with the agent while the turn that began it is still closing."""
        self.jobs.ended(why, aloud=self._is_quiet())

    def abort_start(self) -> None:
        """Kill a CLI that is just starting, so that whoever waits for it fails at once."""
        if self.starting is not None:
            self.starting.kill_now()

    def turn_ended(self, usage: Usage | None) -> None:
        """Count a turn that ended and what it cost."""
        self.turn = None
        self.turns += 1
        self.used_at = self._context.clock()
        self._last_used_at = _now()
        if usage is not None:
            self.usage = Usage(
                **{name: getattr(self.usage, name) + getattr(usage, name) for name in Usage.model_fields}
            )

    def view(self) -> SessionView:
        """Return the session as its user sees it; `turns` and `usage` count what happened here."""
        return SessionView(
            session_id=self.session_id,
            user_id=self.user_id,
            agent_id=self._context.agent_id,
            state="live" if self.process is not None and self.process.alive else "parked",
            turns=self.turns,
            running=self.turn is not None,
            created_at=self._created_at,
            last_used_at=self._last_used_at,
            usage=self.usage,
        )

    async def _renew(self, process: ClaudeProcess) -> None:
        assert self._token is not None
        if self._token_in_use != self._token.session_token:
            await process.renew_credential(self._token.session_token)
            self._token_in_use = self._token.session_token

    async def _start(self, timeout: float) -> ClaudeProcess:
        assert self._token is not None
        token = self._token.session_token
        began = time.perf_counter()
        process = await self._take_spare(token)
        kind = "spare"
        if process is None:
            isolation = self._context.isolation
            if self._came_from_elsewhere:
                await isolation.prepare(self.folder)
                await self._bring()
            resume = await self._history.is_here()
            if not resume and self.turns > 0:  # a tool may remove what is in its own session's folder
                resume = await self._history.bring_again(timeout, missing=True)
            kind = "resumed" if resume else "new"
            self._resumed = resume
            try:
                process = await self._begin(token, timeout, resume=resume)
            except ClaudeEnded:
                await self.raise_if_full()
                if not resume:
                    raise
                process = await self._resume_again(token, timeout)
        process.set_session_id(self.session_id)
        self._token_in_use = token
        seconds = time.perf_counter() - began
        self._context.metrics.cli_start_seconds.labels(kind).observe(seconds)
        if kind == "resumed":
            self._context.metrics.resumed.inc()
        _log.info("session.started", session_id=self.session_id, kind=kind, duration_ms=round(seconds * 1000))
        return process

    async def raise_if_full(self) -> None:
        """Raise ClaudeLimited, with the limit that was reached, when the session's disk has no room for its CLI."""
        full = await self.full_disk()
        if full is not None:
            raise ClaudeLimited(full, details={"limit": "disk"})

    async def full_disk(self) -> str | None:
        """Return that the session's disk is full, for its user; None while it is not."""
        return await disk_full_reason(self._context.isolation, self.folder)

    async def _resume_again(self, token: str, timeout: float) -> ClaudeProcess:
        """Start a CLI that ended at its start once more; if it ends again, with the store's history.

        The first end may have had another reason than the history (no memory, a full disk). Raises ClaudeFailed or
        Unavailable.
        """
        try:
            return await self._begin(token, timeout, resume=True)
        except ClaudeEnded:
            if not await self._history.bring_again(timeout, missing=False):
                raise
        return await self._begin(token, timeout, resume=True)

    async def _bring(self) -> None:
        try:
            await self._history.bring()
        except ClaudeFailed:
            await self.raise_if_full()
            raise
        self._came_from_elsewhere = False

    async def _follow(self) -> None:
        """Wait until nothing is left of an earlier stay of the session here. Raises Unavailable."""
        if self._after is not None:
            await asyncio.wait((self._after,))
            if not self._after.result():
                await self._context.isolation.remove(self.folder)
            self._after = None

    async def _begin(self, token: str, timeout: float, *, resume: bool) -> ClaudeProcess:
        return await start(
            self._context,
            self.folder,
            self.options,
            self.offer,
            token=token,
            user_id=self.user_id,
            resume=resume,
            timeout=timeout,
            approvals=self._ask_before(),
            transcript=self._port,
            on_process=self._note_starting,
        )

    async def _take_spare(self, token: str) -> ClaudeProcess | None:
        """Return a spare's process that is this session's from now on, folder and all; None when none fits."""
        fresh, self._fresh = self._fresh and not self._files_touched, False
        spare = self._prewarmed.take(self.options, self.user_id) if fresh else None
        if spare is None:
            return None
        try:
            return await self._make_own(spare, token)
        except asyncio.CancelledError:  # nobody else knows the spare any more
            self._context.tasks.start("discard-spare", self._discard(spare, ClaudeFailed("the turn gave up")))
            raise

    async def _make_own(self, spare: PrewarmedCli, token: str) -> ClaudeProcess | None:
        try:
            await self._context.isolation.assign(spare.folder, self.user_id)
        except LimitReached as error:  # the user's; nobody has used it yet
            _log.info("spare.not_taken", session_id=self.session_id, error=error.message)
            self._prewarmed.put_back(spare)
            return None
        except LaunchFailed as error:
            await self._discard(spare, error)
            return None
        try:
            await spare.process.renew_credential(token)
            if spare.options.model != self.options.model:
                await spare.process.set_model(self.options.model)
        except ClaudeFailed as error:
            await self._discard(spare, error)
            return None
        await spare.transcript.give(self.mirror)
        self._port = spare.transcript
        self.folder = self.archive.folder = spare.folder
        return spare.process

    async def _discard(self, spare: PrewarmedCli, error: HypercoreError) -> None:
        _log.warning("spare.failed", error=error.message)
        await spare.process.kill()
        await self._context.isolation.remove(spare.folder)

    def _note_starting(self, process: ClaudeProcess | None) -> None:
        self.starting = process

    def _ask_before(self) -> list[HookMatcher] | None:
        tools = self.options.approval_tools
        return self._context.approvals.hooks(self.session_id, self.user_id, tools, self._tell) if tools else None

    def _tell(self, event: ApprovalRequest | ApprovalResolved) -> None:
        if self.turn is not None:
            self.turn.tell(event)

    async def _kill(self) -> None:
        if self.process is not None:
            process, self.process = self.process, None
            await process.kill()
        self.jobs.ended("the session's Claude CLI ended", aloud=self._is_quiet())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
