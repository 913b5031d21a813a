"""One turn: from a placed request to its answer, whatever the CLI, the client and the clock do.

A turn is a task of the server's, not of the request's, so that it always ends in order: a client that goes away, a
deadline, a drain and a deletion all call `stop`, which interrupts the CLI, reads on to the turn's end, and kills the
CLI if that does not come within the grace. The session stays usable, by resume if its process had to go.

The deadline is a timer, not a cancellation: a cancellation inside the SDK's reading would leave its stream in an
unknown state. Only a turn that still waits (for a token, for room, for a start) is cancelled.
"""

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Any, Literal

import structlog
from claude_agent_sdk import ResultMessage

from hypercore_agents.agent.claude.approvals import Approvals
from hypercore_agents.agent.claude.outcome import (
    LOST_CONNECTION,
    StopReason,
    check_output,
    conclude,
    no_gateway,
    stopped,
)
from hypercore_agents.agent.claude.process import ClaudeEnded, ClaudeFailed, ClaudeLimited, ClaudeProcess
from hypercore_agents.agent.claude.translate import CONTENT_LIMIT, Event, Translator
from hypercore_agents.agent.gateway.client import Gateway, Unplaced
from hypercore_agents.agent.launcher.client import LaunchFailed, LimitReached, NoDiskLeft
from hypercore_agents.agent.sessions.capacity import LiveCapacity
from hypercore_agents.agent.sessions.send_buffer import SendBuffer
from hypercore_agents.agent.sessions.session import Session
from hypercore_agents.api.approvals import ApprovalRequest, ApprovalResolved
from hypercore_agents.api.chat import ChatResponse, PlacedChatRequest, TurnStatus, Usage
from hypercore_agents.api.errors import HypercoreError, InternalError, ModelFailed, NotFound, Unavailable
from hypercore_agents.api.events import Delta, EventData, SessionStarted, ToolResult, ToolUse
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.observability.metrics import AgentMetrics
from hypercore_agents.observability.tracing import Span, Tracing

DURABLE_SECONDS = 2.0
"""How long a turn's result waits for the store."""
ARCHIVE_SECONDS = 8.0
"""How long it waits for its workspace beyond the turn's own time; less than the manager waits for a late answer."""
LONGEST_ARCHIVE_SECONDS = 120.0
"""How long it waits for its workspace when the turn has time left."""
READING = frozenset({"Glob", "Grep", "LS", "NotebookRead", "Read", "TodoWrite"})
"""Tools that write nothing into a workspace; all others may."""
SAVED_RESULT = "<persisted-output>"
"""In the result of any tool whose output the Claude CLI saved to a file, since it is long."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Conduct:
    """What every turn of an agent needs. `interrupt_grace` is in seconds."""

    agent_id: str
    gateway: Gateway
    room: LiveCapacity
    metrics: AgentMetrics
    tasks: Tasks
    interrupt_grace: float
    approvals: Approvals
    tracing: Tracing | None = None
    log_content: bool = False


class Turn:
    """A turn of a session. Make it in the running loop, then await `run` once."""

    def __init__(
        self,
        session: Session,
        request: PlacedChatRequest,
        conduct: Conduct,
        *,
        frames: SendBuffer | None,
        notices: list[str],
        span: Span | None = None,
    ) -> None:
        self.session = session
        self.number = request.placement.turn
        self.frames = frames
        self.admitted = False
        self.last_id = ""
        self._prompt = request.prompt
        self._span: Span | None = None
        if conduct.tracing is not None and span is not None:
            self._span = conduct.tracing.begin(
                "turn", parent=span.traceparent, session_id=session.session_id, turn=request.placement.turn
            )
        self._generation = request.placement.generation
        self._timeout = request.placement.timeout
        self._conduct = conduct
        self._notices = notices
        self._loop = asyncio.get_running_loop()
        self._began = time.perf_counter()
        self._deadline = self._loop.call_later(self._timeout, self.stop, "deadline")
        self._killer: asyncio.TimerHandle | None = None
        self._phase: Literal["waiting", "talking", "closing"] = "waiting"
        self._stopped: StopReason | None = None
        self._task: asyncio.Task[object] | None = None
        self._talk = Translator()
        self._heard = self._spoken = False
        self._entered: float | None = None
        self._talking_since: float | None = None
        self._output: Any = None
        self._usage: Usage | None = None
        self._durable = self._workspace_durable = False

    def told(self, outcome: ChatResponse | HypercoreError | None) -> None:
        """End the turn's span with what became of it, and log what was said, where that is switched on by name."""
        if self._span is not None:
            error = outcome.type if isinstance(outcome, HypercoreError) else None
            self._span.end(error="cancelled" if outcome is None else error)
        if not isinstance(outcome, ChatResponse):
            failed = outcome or InternalError("the turn was cut off")
            last: EventData = failed.body(str(structlog.contextvars.get_contextvars().get("request_id", "")))
        else:
            last = outcome
        if self.admitted:  # a turn that never began has no events
            self.last_id, _ = self.session.journal.say(last, kept=last is outcome and self.session.mirror.end_kept)
        if self._conduct.log_content:
            session_id = self.session.session_id
            _log.info("turn.content", session_id=session_id, prompt=self._prompt, content=self._talk.content)

    async def run(self) -> ChatResponse | HypercoreError:
        """Carry the turn out. A domain error is returned, not raised: the task that runs a turn has not failed."""
        self._task = asyncio.current_task()
        try:
            return await self._answer()
        except NotFound:  # by the gateway: whoever asked knows a session, and must not be told that there is none
            return Unplaced("the session lost its place on this agent; try again: it is placed anew", retry_after=1)
        except (ClaudeEnded, LaunchFailed, NoDiskLeft) as error:
            at_fault = self._phase == "waiting" and not isinstance(error, LimitReached) and self.session.is_untouched
            return self._final(error.for_another_agent() if at_fault else error)
        except HypercoreError as error:
            return self._final(await self._explained(error))
        except asyncio.CancelledError:
            if self._phase == "talking":
                await self.session.kill()
            if self._stopped is None:
                raise  # the server's tasks are being cancelled
            return self._ended_by(self._stopped)
        except Exception:
            _log.exception("turn.defect", session_id=self.session.session_id)
            await self.session.kill()
            return self._final(InternalError("an internal error; the agent's log has it under this request_id"))
        finally:
            self._phase = "closing"
            self._deadline.cancel()
            self._conduct.approvals.expire(self.session.session_id)
            if self._killer is not None:
                self._killer.cancel()
            self.session.turn_ended(self._usage)
            if self._talking_since is not None and self._entered is not None:
                now = self._loop.time()
                self._conduct.room.took(now - self._entered, now - self._talking_since)
            if self.session.process is None and not self.session.is_starting:
                self._conduct.room.leave(self.session)
            self._conduct.room.changed()

    def stop(self, reason: StopReason) -> bool:
        """End the turn soon, for this reason; False when it is already ending."""
        if self._stopped is not None or self._phase == "closing":
            return False
        self._stopped = reason
        self._conduct.approvals.expire(self.session.session_id)
        if self.frames is not None:
            self.frames.release()
        process = self.session.process
        if self._phase == "waiting":
            if reason in ("deleted", "draining"):  # else a start that has begun goes on for the session's next turn
                self.session.abort_start()
            if self._task is not None:
                self._task.cancel()
        elif process is not None and reason == "deleted":
            process.kill_now()
        elif process is not None:
            self._killer = self._loop.call_later(self._conduct.interrupt_grace, process.kill_now)
            self._conduct.tasks.start("interrupt", self._interrupt(process))
        return True

    async def _answer(self) -> ChatResponse:
        session, conduct = self.session, self._conduct
        if self._stopped is not None:
            raise asyncio.CancelledError  # stopped before the task had begun
        if session.needs_token(self._timeout):
            session.give_token(await conduct.gateway.session_token(session.session_id, self._generation))
        await conduct.room.enter(session, seconds=self._deadline.when() - self._loop.time())
        self.admitted = True
        self._entered = self._loop.time()
        session.journal.begin_turn()
        self._tell_start()
        result = await self._talk_once_or_twice()
        session.journal.flush()
        self._phase = "closing"
        status = self._status(result)
        if status == "completed" and session.options.output_schema is not None:
            check_output(self._talk, result)
        self._output = result.structured_output if result is not None and status == "completed" else None
        if session.offer.mcp and session.process is not None and self._stopped is None:
            await self._look_at_servers(session.process)
        self._durable, self._workspace_durable = await self._keep(status)
        await self._account()
        return self._response(status)

    async def _talk_once_or_twice(self) -> ResultMessage | None:
        """Talk to the CLI; once more with a new one if the first was dead before it took the prompt.

        Returns None when the process had to be killed after a stop. Raises ClaudeFailed.
        """
        for again in (False, True):
            try:
                process = await self.session.live(timeout=self._timeout)
                self._phase = "talking"
                self._talking_since = self._loop.time()
                return await self._converse(process)
            except ClaudeFailed as error:
                if self._stopped is not None:
                    await self.session.kill()
                    return None
                await self.session.crashed()
                if not isinstance(error, ClaudeLimited):
                    await self.session.raise_if_full()
                if again or self._heard or self._phase == "waiting":
                    raise
                self._phase = "waiting"
        raise AssertionError("unreachable")

    async def _converse(self, process: ClaudeProcess) -> ResultMessage:
        if self._stopped is not None:
            raise ClaudeFailed("stopped before the prompt was sent")
        span = self._begin_cli_span()
        try:
            if span is not None:
                await process.set_traceparent(span.traceparent if span.sampled else None)
            return await self._hear(process)
        finally:
            if span is not None:
                span.end(pid=process.pid)

    def _begin_cli_span(self) -> Span | None:
        tracing = self._conduct.tracing
        if tracing is None or self._span is None:
            return None
        return tracing.begin("claude_cli", parent=self._span.traceparent, session_id=self.session.session_id)

    async def _hear(self, process: ClaudeProcess) -> ResultMessage:
        talk, frames = self._talk, self.frames
        prompt_id = await process.send(self._prompt)
        async with contextlib.aclosing(process.messages()) as messages:
            async for message in messages:
                self._heard = True
                for event in talk.feed(message):
                    self.tell(event)
                if frames is not None and frames.full:
                    await frames.room()
                if talk.result is not None:
                    answered = talk.result.user_message_uuids
                    if answered is None or prompt_id in answered:
                        return talk.result
                    talk.result = None  # of a turn that the CLI began by itself
        raise AssertionError("messages end with an error")

    async def _look_at_servers(self, process: ClaudeProcess) -> None:
        try:
            self._notices += await process.mcp_server_notices()
        except ClaudeFailed as error:
            _log.warning("turn.servers_unknown", session_id=self.session.session_id, error=error.message)

    def _status(self, result: ResultMessage | None) -> TurnStatus:
        talk = self._talk
        if talk.retries:
            self._conduct.metrics.model_retries.inc(talk.retries)
            _log.warning("turn.model_retries", session_id=self.session.session_id, retries=talk.retries)
        if talk.mirror_errors:
            self._conduct.metrics.mirror_errors.inc(talk.mirror_errors)
            _log.warning("turn.mirror_errors", session_id=self.session.session_id, count=talk.mirror_errors)
        if talk.overflowed:
            self._notices.append(f"the answer was cut at {CONTENT_LIMIT} characters")
        missing = sorted(set(self.session.offer.tools) - talk.offered) if talk.offered is not None else []
        if missing:
            self._notices.append(f"the Claude CLI does not have these tools: {', '.join(missing)}")
        if self._stopped is not None and (result is None or result.is_error):
            return stopped(self._stopped, self._timeout)
        assert result is not None
        return conclude(talk, result)

    async def _keep(self, status: TurnStatus) -> tuple[bool, bool]:
        """Wait until the transcript is stored, archive a workspace that may have changed; say which of both is kept.

        The turn's end goes into the log with the transcript: were the agent lost right after, no turn would seem lost
        that was kept. What the turn cost mostly comes with the transcript's answer: one request, not two.
        """
        session = self.session
        archive = session.archive
        workspace = True
        # Asked before the archive is made: what ended before then cannot write after it.
        ran = archive.restless
        archive.restless = ran and any(await session.background_processes())
        if ran:  # an archive that is just being made, of a file that was put, may be older than what ran has written
            archive.note_change()
        if ran and (limit := await session.limit_reached()) is not None:
            self._notices.append(f"{limit}; processes of this turn were ended or could not start")
        if archive.changed:
            workspace = await self._archive()
        if ran and (full := await session.full_disk()) is not None:
            self._notices.append(full)
        self._notices += session.take_notices()
        end = self._response(status).model_copy(update={"durable": True, "workspace_durable": workspace})
        announced = session.journal.announce(end)
        transcript, self._usage = await session.mirror.conclude(self.number, DURABLE_SECONDS, end=announced)
        if not transcript:
            self._notices.append(
                "the session's transcript is full (TRANSCRIPT_MAX_MB): it goes on here, but not in another agent; "
                "start a new session"
                if session.mirror.full
                else "this turn is not in the store yet; were the agent lost now, the turn would be"
            )
        return transcript, workspace

    async def _archive(self) -> bool:
        """Archive the session's files in the time that the turn has left; say whether all of them are stored."""
        archive = self.session.archive
        left = 0.0 if self._stopped is not None else self._deadline.when() - self._loop.time()
        seconds = ARCHIVE_SECONDS + max(0.0, min(left, LONGEST_ARCHIVE_SECONDS - ARCHIVE_SECONDS))
        try:
            async with asyncio.timeout(seconds):
                saved = await archive.save(self._generation)
        except TimeoutError:
            self._notices.append(
                f"the workspace is not archived yet: this takes more than {seconds:.0f} s and goes on; it is durable "
                "once an answer says so"
            )
            return False
        except (HypercoreError, OSError) as error:
            self._notices.append(f"the workspace is not archived: {str(error)[:300]}")
            return False
        if archive.restless:
            archive.note_change()
        if saved.missing is not None:
            self._notices.append(saved.missing)
        return saved.missing is None

    async def _account(self) -> None:
        try:
            if self._usage is None:
                self._usage = await self._conduct.gateway.usage(self.session.session_id, self.number, self._generation)
        except HypercoreError:
            self._notices.append("usage is not known: the gateway did not answer; the ledger has it")
            return
        self._conduct.metrics.tokens.labels("input").inc(self._usage.input_tokens)
        self._conduct.metrics.tokens.labels("output").inc(self._usage.output_tokens)

    async def _interrupt(self, process: ClaudeProcess) -> None:
        try:
            await self.session.look_in_turn()
            await process.interrupt()
        except ClaudeFailed:
            if self._phase == "talking":
                process.kill_now()

    def _final(self, error: HypercoreError) -> HypercoreError:
        return error.after_effects(self.session.session_id, self.number) if self._talk.acted else error

    async def _explained(self, error: HypercoreError) -> HypercoreError:
        """Return the error for a lost connection that names who does not answer, and every other error as it is."""
        if isinstance(error, ModelFailed) and (error.details or {}).get("cause") == LOST_CONNECTION:
            try:
                await self._conduct.gateway.usage(self.session.session_id, self.number, self._generation)
            except Unavailable:
                return no_gateway()
            except HypercoreError:
                pass
        return error

    def _ended_by(self, reason: StopReason) -> ChatResponse | HypercoreError:
        try:
            return self._response(stopped(reason, self._timeout))
        except HypercoreError as error:
            return self._final(error)

    def _response(self, status: TurnStatus) -> ChatResponse:
        return ChatResponse(
            session_id=self.session.session_id,
            agent_id=self._conduct.agent_id,
            content=self._talk.content,
            usage=self._usage or Usage(),
            status=status,
            turn=self.number,
            tools=self.session.offer.any,
            notices=[*self._notices, *self.session.take_notices()],
            durable=self._durable,
            workspace_durable=self._workspace_durable,
            output=self._output,
            duration_ms=round((time.perf_counter() - self._began) * 1000),
        )

    def _tell_start(self) -> None:
        self._say(
            SessionStarted(
                session_id=self.session.session_id,
                agent_id=self._conduct.agent_id,
                turn=self.number,
                tools=self.session.offer.any,
                notices=self._notices,
            )
        )

    def tell(self, event: Event | ApprovalRequest | ApprovalResolved) -> None:
        """Tell a streaming client."""
        if isinstance(event, ToolUse) and event.name not in READING:
            self.session.archive.note_change()
            self.session.archive.restless = True
        if isinstance(event, ToolResult) and SAVED_RESULT in event.content:
            self.session.archive.note_change()
        if not self._spoken and isinstance(event, Delta):
            self._spoken = True
            self._conduct.metrics.first_delta_seconds.observe(time.perf_counter() - self._began)
            if self._span is not None:
                self._span.note("first_delta")
        self._say(event)

    def _say(self, event: EventData) -> None:
        _, frame = self.session.journal.say(event)
        if self.frames is not None:
            self.frames.put(frame)
