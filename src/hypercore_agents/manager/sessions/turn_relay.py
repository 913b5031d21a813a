"""Runs begun turns: relays each to its agent as bytes, and ends it in the store in any case.

A turn that its agent cannot begin moves to another agent of the pool. The response of one request may therefore consist
of the parts of several agents, of which all but the last have only a beginning.
"""

import asyncio
import contextlib
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Literal

import structlog

from hypercore_agents.api.chat import PlacedChatRequest
from hypercore_agents.api.errors import AgentUnreachable, HypercoreError, Unavailable
from hypercore_agents.api.events import KEEPALIVE_SECONDS, encode
from hypercore_agents.api.internal import REQUEST_ID_HEADER
from hypercore_agents.http.context import Receive, Scope, Send, note_ids, request_id_of, span_of
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.kit.relay.relay import Relay, RelayOutcome, RequestLimits
from hypercore_agents.manager.fleet.agent_client import AgentClient
from hypercore_agents.manager.fleet.directory import AgentDirectory
from hypercore_agents.manager.idempotency import Recording
from hypercore_agents.manager.sessions.missed_heartbeats import MissedHeartbeats
from hypercore_agents.manager.sessions.turn_ending import TurnEnding
from hypercore_agents.manager.sessions.turns import BegunTurn, Turns
from hypercore_agents.observability.metrics import ManagerMetrics, status_class

_log = structlog.get_logger(__name__)

SLACK_SECONDS = 10.0
"""Additional time that the relay waits after a turn's own limit, so that the agent's response to the limit arrives."""
MAX_MOVES = 2
"""How often a turn that could not begin moves to another agent."""
_END_RETRY_PAUSES = (0.05, 0.2, 1.0, 3.0, 10.0, 30.0)


class TurnRelay:
    """Runs turns. `wake` queues a step of the reconciler for an agent that did not respond."""

    def __init__(
        self,
        *,
        turns: Turns,
        directory: AgentDirectory,
        relay: Relay,
        client: AgentClient,
        metrics: ManagerMetrics,
        missed_heartbeats: MissedHeartbeats,
        wake: Callable[[str], None],
        tasks: Tasks,
    ) -> None:
        self._turns = turns
        self._directory = directory
        self._relay = relay
        self._client = client
        self._metrics = metrics
        self._missed_heartbeats = missed_heartbeats
        self._wake = wake
        self._tasks = tasks

    async def run(
        self, turn: BegunTurn, scope: Scope, receive: Receive, send: Send, *, recording: Recording | None = None
    ) -> None:
        """Relay the turn on bare ASGI and end it. Raises a domain error if no response was started.

        A turn that its agent cannot begin moves to another agent, up to `MAX_MOVES` times. With a `recording` the turn
        continues when its client disconnects, and its response is stored.
        """
        request_id = request_id_of(scope)
        response = _ContinuedResponse(send)
        tried: list[str] = []
        next_turn: BegunTurn | None = turn
        while next_turn is not None:
            turn = next_turn
            note_ids(
                scope,
                user_id=turn.request.user_id,
                session_id=turn.session_id,
                agent_id=turn.endpoint.agent_id,
                turn=turn.placement.turn,
            )
            ending = TurnEnding(
                self._turns,
                turn,
                request_id,
                recording,
                may_move=turn.may_move and len(tried) < MAX_MOVES,
                id_sent=response.started,
            )
            tried.append(turn.endpoint.agent_id)
            next_turn = await self._run_on_agent(turn, ending, scope, receive, response, tried)

    async def _run_on_agent(
        self,
        turn: BegunTurn,
        ending: TurnEnding,
        scope: Scope,
        receive: Receive,
        response: "_ContinuedResponse",
        tried: Sequence[str],
    ) -> BegunTurn | None:
        """Run the turn on its agent. Returns the turn that continues on another agent if this one could not begin
        it."""
        outcome = RelayOutcome()
        moved: BegunTurn | None = None
        try:
            try:
                if ending.recording is not None and len(tried) == 1:
                    await ending.recording.record_created(turn.session_id)
                outcome = await self._relay_to_agent(turn, ending, scope, receive, response)
                failure = ending.refused
            except HypercoreError as error:
                failure = error
            if ending.refused is not None:
                moved = await asyncio.shield(self._tasks.start("move-turn", self._move(turn, tried)))
            if failure is not None and moved is None:
                outcome.error = ending.explained(failure)
                if not response.started:
                    raise outcome.error
                await response.end(encode(outcome.error.body(ending.request_id)))
        finally:
            if moved is None:
                await _wait_for_end(self._tasks.start("end-turn", self._end(turn, ending, outcome)))
        return moved

    async def _relay_to_agent(
        self, turn: BegunTurn, ending: TurnEnding, scope: Scope, receive: Receive, response: "_ContinuedResponse"
    ) -> RelayOutcome:
        span = span_of(scope)
        with self._missed_heartbeats.watching(turn.endpoint.agent_id) as control:
            return await self._relay.relay(
                scope,
                receive,
                response.send,
                url=f"{turn.endpoint.address}/v1/agent/chat",
                method="POST",
                headers=[
                    ("authorization", f"Bearer {turn.endpoint.bearer}"),
                    ("content-type", "application/json"),
                    ("accept", "text/event-stream" if turn.request.stream else "application/json"),
                    (REQUEST_ID_HEADER, ending.request_id),
                    *([("traceparent", span.traceparent)] if span is not None else []),
                ],
                pass_headers=False,
                body=_body(turn),
                limits=_limits(turn),
                observer=ending,
                on_disconnect=_on_disconnect(turn, ending.recording, started=response.started),
                control=control,
            )

    async def _move(self, turn: BegunTurn, tried: Sequence[str]) -> BegunTurn | None:
        """Move a turn to an agent that was not tried, and delete the session from its agent. None: there is no
        agent."""
        try:
            moved = await self._turns.move(turn, tried)
        except HypercoreError as error:
            _log.warning("turn.not_moved", session_id=turn.session_id, error=error.message)
            return None
        if moved is not None:
            before = turn.endpoint
            deletion = self._client.delete_session(before.address, before.bearer, turn.session_id)
            self._tasks.start("forget-session", deletion)
        return moved

    async def _end(self, turn: BegunTurn, ending: TurnEnding, outcome: RelayOutcome) -> None:
        if ending.recording is not None:
            if outcome.error is not None and (outcome.error.details or {}).get("acted"):
                await ending.recording.failed_with(outcome.error, ending.request_id)
            await ending.recording.end(failed=True)  # no effect if it has ended successfully
        for pause in _END_RETRY_PAUSES:
            try:
                await ending.finish()
                break
            except Unavailable:
                await asyncio.sleep(pause)
        if ending.discards:
            await self._client.delete_session(turn.endpoint.address, turn.endpoint.bearer, turn.session_id)
        if isinstance(outcome.error, AgentUnreachable) and not ending.is_agents_error:
            _log.warning("turn.agent_unreachable", agent_id=turn.endpoint.agent_id, error=outcome.error.message)
            self._directory.forget(turn.endpoint.agent_id)
            self._wake(turn.endpoint.agent_id)
        status = outcome.error.status if outcome.error is not None else outcome.status
        label = "disconnected" if outcome.client_gone else status_class(status)
        self._metrics.turns.labels(label).inc()


class _ContinuedResponse:
    """The response to one request, of which several agents may write a part. `started`: its headers were sent."""

    __slots__ = ("_send", "started")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send a message; the headers of later parts are dropped."""
        if message["type"] == "http.response.start":
            if self.started:
                return
            self.started = True
        await self._send(message)

    async def end(self, frame: bytes) -> None:
        """Send a last event, unless the client has disconnected."""
        with contextlib.suppress(OSError):
            await self._send({"type": "http.response.body", "body": frame})


async def _wait_for_end(ending: "asyncio.Task[None]") -> None:
    """Wait for the end of a turn. If it is cancelled, because the manager stops, the client's response is not
    delayed."""
    try:
        await asyncio.shield(ending)
    except asyncio.CancelledError:
        if not ending.cancelled():
            raise


def _body(turn: BegunTurn) -> bytes:
    fields = {**dict(turn.request), "session_id": turn.session_id, "placement": turn.placement}
    return PlacedChatRequest.model_construct(**fields).model_dump_json(exclude_none=True).encode()


def _on_disconnect(
    turn: BegunTurn, recording: Recording | None, *, started: bool
) -> Literal["cancel", "drain", "drain_begun"]:
    if recording is not None:
        return "drain"
    if turn.request.on_disconnect == "interrupt":
        return "cancel"
    # A client that leaves a stream before its first event does not have the session's id, so it could neither follow
    # nor interrupt the turn.
    return "drain_begun" if turn.request.stream and not started else "drain"


def _limits(turn: BegunTurn) -> RequestLimits:
    total = turn.placement.timeout + SLACK_SECONDS
    return RequestLimits(response=total, idle=3 * KEEPALIVE_SECONDS, total=total + SLACK_SECONDS)
