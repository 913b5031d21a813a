"""The Claude CLI of one session: starts or resumes it for a turn, renews its credential, and kills it at the end.

Invariants: a session has at most one CLI process. Code that starts, parks or kills it holds `guard`. A start that has
begun continues when its turn gives up: the session's next turn finds the CLI live.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import structlog
from claude_agent_sdk import HookMatcher

from hypercore_agents.agent.claude.context import AgentContext
from hypercore_agents.agent.claude.options import Offer
from hypercore_agents.agent.claude.prewarmed import PrewarmedCli, PrewarmedClis
from hypercore_agents.agent.claude.process import ClaudeEnded, ClaudeFailed, ClaudeProcess
from hypercore_agents.agent.claude.start import start
from hypercore_agents.agent.launcher.client import LaunchFailed, LimitReached
from hypercore_agents.agent.persistence.transcript import TranscriptPort
from hypercore_agents.agent.persistence.transcript_mirror import TranscriptMirror
from hypercore_agents.agent.sessions.cli_state import CliStatus
from hypercore_agents.agent.sessions.files import SessionFiles
from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.api.internal import SessionToken
from hypercore_agents.api.options import SessionOptions

_log = structlog.get_logger(__name__)
TOKEN_MARGIN_SECONDS = 60.0
"""A session token must outlive the turn that it serves by this much."""


class SessionCli:
    """One session's CLI. `first_turn`: the session is new, so a prewarmed CLI may serve it.

    `approvals` returns the hooks for tools that need the user's approval. `on_killed` is called after a CLI was killed,
    `on_start_done` when a start has succeeded or failed.
    """

    def __init__(
        self,
        session_id: str,
        user_id: str,
        options: SessionOptions,
        offer: Offer,
        context: AgentContext,
        prewarmed: PrewarmedClis,
        files: SessionFiles,
        mirror: TranscriptMirror,
        *,
        first_turn: bool,
        approvals: Callable[[], list[HookMatcher] | None],
        on_killed: Callable[[], None],
        on_start_done: Callable[[], None],
    ) -> None:
        self.status = CliStatus()
        self.guard = asyncio.Lock()
        self._session_id = session_id
        self._user_id = user_id
        self._options = options
        self._offer = offer
        self._context = context
        self._prewarmed = prewarmed
        self._files = files
        self._mirror = mirror
        self._port = TranscriptPort(mirror)
        self._may_take_prewarmed = first_turn
        self._approvals = approvals
        self._on_killed = on_killed
        self._on_start_done = on_start_done
        self._started_as: Literal["new", "resumed", "prewarmed"] | None = None
        self._transcript_expected = False
        self._token: SessionToken | None = None
        self._token_in_use: str | None = None

    def needs_token(self, timeout: float) -> bool:
        """Return whether the credential would not outlive a turn of `timeout` seconds."""
        return self._token is None or self._token.expires_at - time.time() < timeout + TOKEN_MARGIN_SECONDS

    def set_token(self, token: SessionToken) -> None:
        """Use this credential from the next turn on."""
        self._token = token

    def expect_transcript(self) -> None:
        """Record that a turn has run here: from now on, a missing transcript was deleted and must be restored."""
        self._transcript_expected = True

    @property
    def has_prewarmed(self) -> bool:
        """Whether a prewarmed CLI suits the session, so that its turn waits for no start."""
        return self._may_take_prewarmed and not self._files.touched and self._prewarmed.has(self._options)

    @property
    def is_unused(self) -> bool:
        """Whether the CLI, connected or starting, is new and was never given anything of this session."""
        process = self.status.connecting or self.status.process
        return (
            process is not None
            and not process.prompted
            and self._started_as == "new"
            and not self._files.touched
            and not self._files.archive.changed
            and not self._options.approval_tools
            and not self._options.mcp_servers
            and self._context.isolation.separate
        )

    async def take_unused(self) -> PrewarmedCli | None:
        """Wait for the start in progress and take the unused CLI out of this session; None when there is none."""
        await self._wait_for_start()
        async with self.guard:
            process = self.status.process
            if process is None or not process.alive or process.prompted or not self._port.detach():
                return None
            self.status.process_ended()
            process.set_session_id("")
            await process.renew_credential("")
            return PrewarmedCli(self._options, replace(self._files.folder, released=False), process, self._port)

    async def connect(self, *, timeout: float) -> ClaudeProcess:
        """Return the connected CLI with a valid credential; start or resume one if there is none.

        `timeout` is the turn's, in seconds. Raises ClaudeFailed or Unavailable; the session then has no process.
        """
        await self._wait_for_start()  # of an earlier turn that gave up
        async with self.guard:
            if (process := await self._renewed()) is not None:
                return process
        self.status.start_begins()
        self.status.start_task = starting = self._context.tasks.start("live", self._try_start(timeout))
        starting.add_done_callback(self._start_done)
        try:
            result = await asyncio.shield(starting)
        except asyncio.CancelledError:
            if self.status.connecting is None and not starting.done():
                starting.cancel()  # it only waited for a start slot, so nothing is lost
                await asyncio.wait((starting,))
            elif not self.status.has_ended:
                _log.info("session.start_continues", session_id=self._session_id)
            raise
        if isinstance(result, HypercoreError):
            raise result
        return result

    def abort_start(self) -> None:
        """Kill a CLI that is connecting, so that its start fails at once."""
        if self.status.connecting is not None:
            self.status.connecting.kill_now()

    async def park(self) -> None:
        """End the idle CLI gracefully. The caller holds `guard`."""
        process = self.status.process
        if process is not None:
            await process.park()  # if this is cancelled, `kill` still finds the process
            self.status.process_ended()
            _log.info("session.parked", session_id=self._session_id)

    async def kill(self) -> None:
        """Kill the CLI and everything it started. The caller holds `guard`."""
        process = self.status.process
        if process is not None:
            self.status.process_ended()
            await process.kill()
        self._on_killed()

    async def _wait_for_start(self) -> None:
        if self.status.start_task is not None:
            await asyncio.wait((self.status.start_task,))

    def _start_done(self, _: object) -> None:
        self.status.start_done()
        self._on_start_done()

    async def _renewed(self) -> ClaudeProcess | None:
        """Return the CLI with the latest credential; None when there is no CLI, or none that responds."""
        process = self.status.process
        if process is None or not process.alive:
            return None
        assert self._token is not None
        try:
            if self._token_in_use != self._token.session_token:
                await process.renew_credential(self._token.session_token)
                self._token_in_use = self._token.session_token
        except ClaudeFailed as error:
            _log.warning("session.renewal_failed", session_id=self._session_id, error=error.message)
            return None
        return process

    async def _try_start(self, timeout: float) -> ClaudeProcess | HypercoreError:
        try:
            async with self.guard:
                await self.kill()
                await self._files.wait_for_predecessor()
                self.status.connected(await self._start(timeout))
                assert self.status.process is not None
                return self.status.process
        except HypercoreError as error:  # returned: if its turn has given up, an exception would count as a defect
            return error

    async def _start(self, timeout: float) -> ClaudeProcess:
        assert self._token is not None
        token = self._token.session_token
        began = time.perf_counter()
        process = await self._take_prewarmed(token)
        if process is not None:
            self._started_as = "prewarmed"
        else:
            process = await self._start_new(token, timeout)
        process.set_session_id(self._session_id)
        self._token_in_use = token
        seconds = time.perf_counter() - began
        self._context.metrics.cli_start_seconds.labels(self._started_as).observe(seconds)
        if self._started_as == "resumed":
            self._context.metrics.resumed.inc()
        duration_ms = round(seconds * 1000)
        _log.info("session.started", session_id=self._session_id, kind=self._started_as, duration_ms=duration_ms)
        return process

    async def _start_new(self, token: str, timeout: float) -> ClaudeProcess:
        """Start a CLI for this session, which resumes the transcript if there is one."""
        await self._files.fetch()
        history = self._files.history
        resume = await history.has_transcript()
        if not resume and self._transcript_expected:  # a tool may delete files in its own session's folder
            resume = await history.replace_transcript(timeout, missing=True)
        self._started_as = "resumed" if resume else "new"
        try:
            return await self._start_process(token, timeout, resume=resume)
        except ClaudeEnded:
            await self._files.raise_if_full()
            if not resume:
                raise
            return await self._resume_again(token, timeout)

    async def _resume_again(self, token: str, timeout: float) -> ClaudeProcess:
        """Repeat a start in which the CLI exited; if it exits again, restore the store's transcript and start again.

        The first exit may have had a cause other than the transcript (no memory, a full disk). Raises ClaudeFailed or
        Unavailable.
        """
        try:
            return await self._start_process(token, timeout, resume=True)
        except ClaudeEnded:
            if not await self._files.history.replace_transcript(timeout, missing=False):
                raise
        return await self._start_process(token, timeout, resume=True)

    async def _start_process(self, token: str, timeout: float, *, resume: bool) -> ClaudeProcess:
        return await start(
            self._context,
            self._files.folder,
            self._options,
            self._offer,
            token=token,
            user_id=self._user_id,
            resume=resume,
            timeout=timeout,
            approvals=self._approvals(),
            transcript=self._port,
            on_process=self._set_connecting,
        )

    def _set_connecting(self, process: ClaudeProcess | None) -> None:
        self.status.connecting = process

    async def _take_prewarmed(self, token: str) -> ClaudeProcess | None:
        """Take a prewarmed CLI and its folder for this session, and return its process; None if none suits it."""
        may_take, self._may_take_prewarmed = self._may_take_prewarmed and not self._files.touched, False
        taken = self._prewarmed.take(self._options, self._user_id) if may_take else None
        if taken is None:
            return None
        try:
            return await self._assign_prewarmed(taken, token)
        except asyncio.CancelledError:  # nothing else refers to the CLI any more
            self._context.tasks.start("discard-prewarmed", self._discard(taken, ClaudeFailed("the turn gave up")))
            raise

    async def _assign_prewarmed(self, taken: PrewarmedCli, token: str) -> ClaudeProcess | None:
        try:
            await self._context.isolation.assign(taken.folder, self._user_id)
        except LimitReached as error:  # the user's limit; the CLI is still unused
            _log.info("prewarmed.not_taken", session_id=self._session_id, error=error.message)
            self._prewarmed.put_back(taken)
            return None
        except LaunchFailed as error:
            await self._discard(taken, error)
            return None
        try:
            await taken.process.renew_credential(token)
            if taken.options.model != self._options.model:
                await taken.process.set_model(self._options.model)
        except ClaudeFailed as error:
            await self._discard(taken, error)
            return None
        await taken.transcript.attach(self._mirror)
        self._port = taken.transcript
        self._files.folder = taken.folder
        return taken.process

    async def _discard(self, taken: PrewarmedCli, error: HypercoreError) -> None:
        _log.warning("prewarmed.failed", error=error.message)
        await taken.process.kill()
        await self._context.isolation.remove(taken.folder)
