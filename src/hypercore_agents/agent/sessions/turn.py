"""One turn: runs a placed request on the session's CLI, and always ends with an answer or an error.

A turn runs as a task of the server, not of the request, so that it always ends in order. A client that disconnects, a
deadline, a drain and a deletion all call `stop`: it interrupts the CLI, reads on to the turn's end, and kills the CLI
if that end does not come within the grace period. The session stays usable; if its CLI was killed, the next turn
resumes it.

The deadline is a timer, not a cancellation: a cancellation while the SDK reads would leave its stream in an unknown
state. Only a turn that still waits (for a token, for capacity, for a start) is cancelled.
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
from hypercore_agents.agent.gateway.client import GatewayClient, Unplaced
from hypercore_agents.agent.launcher.client import DiskAtCapacity, LaunchFailed, LimitReached
from hypercore_agents.agent.sessions.capacity import LiveCapacity
from hypercore_agents.agent.sessions.send_buffer import SendBuffer
from hypercore_agents.agent.sessions.session import Session
from hypercore_agents.agent.sessions.turn_storage import TurnStorage
from hypercore_agents.api.approvals import ApprovalRequest, ApprovalResolved
from hypercore_agents.api.chat import ChatResponse, PlacedChatRequest, TurnStatus, Usage
from hypercore_agents.api.errors import HypercoreError, InternalError, ModelFailed, NotFound, Unavailable
from hypercore_agents.api.events import Delta, EventData, SessionStarted, ToolResult, ToolUse
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.observability.metrics import AgentMetrics
from hypercore_agents.observability.tracing import Span, Tracing

READING = frozenset({"Glob", "Grep", "LS", "NotebookRead", "Read", "TodoWrite"})
"""Tools that write nothing into a workspace; all others may."""
SAVED_RESULT = "<persisted-output>"
"""Part of the result of a tool whose output was so long that the Claude CLI saved it to a file."""
Outcome = ChatResponse | HypercoreError
"""What a turn ends with."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class TurnContext:
    """What every turn of an agent is run with. `interrupt_grace` is in seconds."""

    agent_id: str
    gateway: GatewayClient
    capacity: LiveCapacity
    metrics: AgentMetrics
    tasks: Tasks
    interrupt_grace: float
    approvals: Approvals
    tracing: Tracing | None = None
    log_content: bool = False


class Turn:
    """A turn of a session. Create it in the running loop, then await `run` once."""

    def __init__(
        self,
        session: Session,
        request: PlacedChatRequest,
        context: TurnContext,
        *,
        send_buffer: SendBuffer | None,
        notices: list[str],
        span: Span | None = None,
    ) -> None:
        self.session = session
        self.number = request.placement.turn
        self.send_buffer = send_buffer
        self.admitted = False
        self.last_id = ""
        self._prompt = request.prompt
        self._span: Span | None = None
        if context.tracing is not None and span is not None:
            self._span = context.tracing.begin(
                "turn", parent=span.traceparent, session_id=session.session_id, turn=request.placement.turn
            )
        self._generation = request.placement.generation
        self._timeout = request.placement.timeout
        self._context = context
        self._notices = notices
        self._loop = asyncio.get_running_loop()
        self._began = time.perf_counter()
        self._deadline = self._loop.call_later(self._timeout, self.stop, "deadline")
        self._kill_timer: asyncio.TimerHandle | None = None
        self._phase: Literal["waiting", "running", "closing"] = "waiting"
        self._stopped: StopReason | None = None
        self._interrupted = asyncio.Event()
        self._task: asyncio.Task[object] | None = None
        self._translator = Translator()
        self._cli_answered = self._first_delta_sent = False
        self._entered: float | None = None
        self._running_since: float | None = None
        self._output: Any = None
        self._storage = TurnStorage(
            session, self.number, self._generation, context.gateway, context.metrics, self._notices
        )

    def record_outcome(self, outcome: Outcome | None) -> None:
        """Publish the turn's last event and end its span; None: the turn's task was cancelled."""
        if self._span is not None:
            error = outcome.type if isinstance(outcome, HypercoreError) else None
            self._span.end(error="cancelled" if outcome is None else error)
        if not isinstance(outcome, ChatResponse):
            failed = outcome or InternalError("the turn was cut off")
            last: EventData = failed.body(str(structlog.contextvars.get_contextvars().get("request_id", "")))
        else:
            last = outcome
        if self.admitted:  # a turn that never began has no events
            stored = last is outcome and self.session.mirror.end_stored
            self.last_id, _ = self.session.journal.publish(last, stored=stored)
        if self._context.log_content:
            session_id, content = self.session.session_id, self._translator.content
            _log.info("turn.content", session_id=session_id, prompt=self._prompt, content=content)

    async def run(self) -> Outcome:
        """Run the turn. A domain error is returned, not raised: the task that runs a turn has not failed."""
        self._task = asyncio.current_task()
        try:
            return await self._answer()
        except NotFound:  # from the gateway; the session exists, so the client must not get a 404
            return Unplaced("the session is no longer on this agent; retry to place it again", retry_after=1)
        except (ClaudeEnded, LaunchFailed, DiskAtCapacity) as error:
            agent_failed = self._phase == "waiting" and not isinstance(error, LimitReached)
            return self._final(error.for_another_agent() if agent_failed and self.session.is_untouched else error)
        except HypercoreError as error:
            return self._final(await self._explained(error))
        except asyncio.CancelledError:
            if self._phase == "running":
                await self.session.kill()
            if self._stopped is None:
                raise  # the server's tasks are being cancelled
            return self._ended_by(self._stopped)
        except Exception:
            _log.exception("turn.defect", session_id=self.session.session_id)
            await self.session.kill()
            return self._final(InternalError("internal error; search the agent's log for this request_id"))
        finally:
            self._phase = "closing"
            self._deadline.cancel()
            self._context.approvals.expire(self.session.session_id)
            if self._kill_timer is not None:
                self._kill_timer.cancel()
            self.session.turn_ended(self._storage.usage)
            if self._running_since is not None and self._entered is not None:
                now = self._loop.time()
                self._context.capacity.record_turn(now - self._entered, now - self._running_since)
            if self.session.process is None and not self.session.status.is_starting:
                self._context.capacity.release(self.session)
            self._context.capacity.notify_change()

    def stop(self, reason: StopReason) -> bool:
        """End the turn soon, for this reason; return False when it is already ending."""
        if self._stopped is not None or self._phase == "closing":
            return False
        self._stopped = reason
        process = self.session.process
        interrupts = self._phase == "running" and process is not None and reason != "deleted"
        self._context.approvals.expire(self.session.session_id, interrupted=self._interrupted if interrupts else None)
        if self.send_buffer is not None:
            self.send_buffer.release()
        if self._phase == "waiting":
            if reason in ("deleted", "draining"):  # otherwise a start that has begun continues for the next turn
                self.session.cli.abort_start()
            if self._task is not None:
                self._task.cancel()
        elif process is not None and reason == "deleted":
            process.kill_now()
        elif process is not None:
            self._kill_timer = self._loop.call_later(self._context.interrupt_grace, process.kill_now)
            self._context.tasks.start("interrupt", self._interrupt(process))
        return True

    def publish(self, event: Event | ApprovalRequest | ApprovalResolved) -> None:
        """Add an event to the session's log and to the turn's stream."""
        if isinstance(event, ToolUse) and event.name not in READING:
            self.session.files.archive.note_change()
            self.session.files.archive.may_be_written_late = True
        if isinstance(event, ToolResult) and SAVED_RESULT in event.content:
            self.session.files.archive.note_change()
        if not self._first_delta_sent and isinstance(event, Delta):
            self._first_delta_sent = True
            self._context.metrics.first_delta_seconds.observe(time.perf_counter() - self._began)
            if self._span is not None:
                self._span.note("first_delta")
        self._publish(event)

    def _publish(self, event: EventData) -> None:
        _, frame = self.session.journal.publish(event)
        if self.send_buffer is not None:
            self.send_buffer.put(frame)

    async def _answer(self) -> ChatResponse:
        session, context = self.session, self._context
        if self._stopped is not None:
            raise asyncio.CancelledError  # stopped before the task had begun
        if session.cli.needs_token(self._timeout):
            session.set_token(await context.gateway.session_token(session.session_id, self._generation))
        await context.capacity.enter(session, seconds=self._seconds_left())
        self.admitted = True
        self._entered = self._loop.time()
        session.journal.begin_turn()
        self._publish_start()
        result = await self._run_with_retry()
        session.journal.flush()
        self._phase = "closing"
        status = self._status(result)
        if status == "completed" and session.options.output_schema is not None:
            check_output(self._translator, result)
        self._output = result.structured_output if result is not None and status == "completed" else None
        if session.offer.mcp and session.process is not None and self._stopped is None:
            await self._note_missing_servers(session.process)
        await self._storage.store(
            answer=lambda: self._response(status),
            seconds_left=lambda: 0.0 if self._stopped is not None else max(0.0, self._seconds_left()),
        )
        await self._storage.account()
        return self._response(status)

    def _seconds_left(self) -> float:
        return self._deadline.when() - self._loop.time()

    async def _run_with_retry(self) -> ResultMessage | None:
        """Run the prompt on the CLI; once more on a new CLI if the first one ended before it took the prompt.

        Returns None when the CLI had to be killed after a stop. Raises ClaudeFailed.
        """
        for is_retry in (False, True):
            try:
                process = await self.session.cli.connect(timeout=self._timeout)
                self._phase = "running"
                self._running_since = self._loop.time()
                return await self._converse(process)
            except ClaudeFailed as error:
                if self._stopped is not None:
                    await self.session.kill()
                    return None
                await self.session.recover_from_crash()
                if not isinstance(error, ClaudeLimited):
                    await self.session.files.raise_if_full()
                if is_retry or self._cli_answered or self._phase == "waiting":
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
            return await self._read_answer(process)
        finally:
            if span is not None:
                span.end(pid=process.pid)

    def _begin_cli_span(self) -> Span | None:
        tracing = self._context.tracing
        if tracing is None or self._span is None:
            return None
        return tracing.begin("claude_cli", parent=self._span.traceparent, session_id=self.session.session_id)

    async def _read_answer(self, process: ClaudeProcess) -> ResultMessage:
        translator, send_buffer = self._translator, self.send_buffer
        prompt_id = await process.send(self._prompt)
        async with contextlib.aclosing(process.messages()) as messages:
            async for message in messages:
                self._cli_answered = True
                for event in translator.feed(message):
                    self.publish(event)
                if send_buffer is not None and send_buffer.full:
                    await send_buffer.wait_for_space()
                if translator.result is not None:
                    answered = translator.result.user_message_uuids
                    if answered is None or prompt_id in answered:
                        return translator.result
                    translator.result = None  # of a turn that the CLI began by itself
        raise AssertionError("messages end with an error")

    async def _note_missing_servers(self, process: ClaudeProcess) -> None:
        try:
            self._notices += await process.mcp_server_notices()
        except ClaudeFailed as error:
            _log.warning("turn.servers_unknown", session_id=self.session.session_id, error=error.message)

    def _status(self, result: ResultMessage | None) -> TurnStatus:
        translator, metrics, session_id = self._translator, self._context.metrics, self.session.session_id
        if translator.retries:
            metrics.model_retries.inc(translator.retries)
            _log.warning("turn.model_retries", session_id=session_id, retries=translator.retries)
        if translator.mirror_errors:
            metrics.mirror_errors.inc(translator.mirror_errors)
            _log.warning("turn.mirror_errors", session_id=session_id, count=translator.mirror_errors)
        if translator.overflowed:
            self._notices.append(f"the answer was cut at {CONTENT_LIMIT} characters")
        offered = translator.offered
        missing = sorted(set(self.session.offer.tools) - offered) if offered is not None else []
        if missing:
            self._notices.append(f"the Claude CLI does not have these tools: {', '.join(missing)}")
        if self._stopped is not None and (result is None or result.is_error):
            return stopped(self._stopped, self._timeout)
        assert result is not None
        return conclude(translator, result)

    async def _interrupt(self, process: ClaudeProcess) -> None:
        try:
            await self.session.check_jobs_before_interrupt()
            await process.interrupt()
        except ClaudeFailed:
            if self._phase == "running":
                process.kill_now()
        finally:
            self._interrupted.set()

    def _final(self, error: HypercoreError) -> HypercoreError:
        return error.after_effects(self.session.session_id, self.number) if self._translator.acted else error

    async def _explained(self, error: HypercoreError) -> HypercoreError:
        """Return an error that names the gateway if it caused a lost model connection, else the error as it is."""
        if isinstance(error, ModelFailed) and (error.details or {}).get("cause") == LOST_CONNECTION:
            try:
                await self._context.gateway.usage(self.session.session_id, self.number, self._generation)
            except Unavailable:
                return no_gateway()
            except HypercoreError:
                pass
        return error

    def _ended_by(self, reason: StopReason) -> Outcome:
        try:
            return self._response(stopped(reason, self._timeout))
        except HypercoreError as error:
            return self._final(error)

    def _response(self, status: TurnStatus) -> ChatResponse:
        return ChatResponse(
            session_id=self.session.session_id,
            agent_id=self._context.agent_id,
            content=self._translator.content,
            usage=self._storage.usage or Usage(),
            status=status,
            turn=self.number,
            tools=self.session.offer.any,
            notices=[*self._notices, *self.session.take_notices()],
            durable=self._storage.transcript_durable,
            workspace_durable=self._storage.workspace_durable,
            output=self._output,
            duration_ms=round((time.perf_counter() - self._began) * 1000),
        )

    def _publish_start(self) -> None:
        self._publish(
            SessionStarted(
                session_id=self.session.session_id,
                agent_id=self._context.agent_id,
                turn=self.number,
                tools=self.session.offer.any,
                notices=self._notices,
            )
        )
