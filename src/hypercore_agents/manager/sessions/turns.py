"""One turn: begun in the store, relayed to the agent as bytes, ended in the store, however it went.

The turn is ended before the answer's last bytes are passed on, so that whoever has read an answer to its end can send
the next turn at once. A session whose first turn brought no answer that names it is ended with that turn: its
place would otherwise be lost, since nobody knows the session's id.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Literal

import structlog

from hypercore_agents.api.chat import ChatRequest, PlacedChatRequest
from hypercore_agents.api.errors import AgentUnreachable, DeadlineExceeded, HypercoreError, Unavailable, parse_error
from hypercore_agents.api.events import KEEPALIVE, KEEPALIVE_SECONDS, encode
from hypercore_agents.api.internal import REQUEST_ID_HEADER
from hypercore_agents.http.context import Receive, Scope, Send, note_ids, request_id_of, span_of
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.kit.relay.relay import Observer, Relay, RelayOutcome, RequestLimits, UpstreamResponse
from hypercore_agents.manager.fleet.agent_client import AgentClient
from hypercore_agents.manager.fleet.directory import AgentDirectory
from hypercore_agents.manager.idempotency import ActedWatch, Recording
from hypercore_agents.manager.sessions.placement import BegunTurn, HeldSession, Placements
from hypercore_agents.manager.sessions.sessions import SessionScope
from hypercore_agents.manager.sessions.silence import SilenceWatch
from hypercore_agents.observability.metrics import ManagerMetrics, status_class

_log = structlog.get_logger(__name__)

SLACK_SECONDS = 10.0
"""How much longer than a turn's own limit the relay waits, so that the agent's answer to it comes first."""


MOST_MOVES = 2
"""How often a turn that its agent could not begin is placed on another agent."""

_AGENT_FAULTS = frozenset((502, 503))
_ERROR_BYTES = 64 * 1024
_REFUSED = b'"other_agent":true'
_ENDING_PAUSES = (0.05, 0.2, 1.0, 3.0, 10.0, 30.0)


class Turns:
    """Runs turns. `wake` has the reconciler look at an agent that did not answer."""

    def __init__(
        self,
        *,
        placements: Placements,
        directory: AgentDirectory,
        relay: Relay,
        client: AgentClient,
        metrics: ManagerMetrics,
        silence: SilenceWatch,
        wake: Callable[[str], None],
        tasks: Tasks,
    ) -> None:
        self._placements = placements
        self._directory = directory
        self._relay = relay
        self._client = client
        self._metrics = metrics
        self._silence = silence
        self._wake = wake
        self._tasks = tasks

    async def begin(
        self, request: ChatRequest, *, agent_id: str | None = None, gone: Callable[[], Awaitable[bool]] | None = None
    ) -> BegunTurn:
        """Begin a turn; it must be given to `run`. Raises as `Placements.begin` does."""
        return await self._placements.begin(request, agent_id=agent_id, gone=gone)

    async def hold(self, session_id: str, within: SessionScope) -> HeldSession:
        """Have a session on a running agent, files and all, though no turn begins; return where it is.

        Raises as `Placements.hold` does, and what the agent says when it cannot.
        """
        held = await self._placements.hold(session_id, within)
        if not held.running:
            try:
                await self._client.open_session(held.endpoint.address, held.endpoint.bearer, held.opening)
            except AgentUnreachable:
                self._directory.forget(held.endpoint.agent_id)
                self._wake(held.endpoint.agent_id)
                raise
        return held

    async def run(
        self, turn: BegunTurn, scope: Scope, receive: Receive, send: Send, *, recording: Recording | None = None
    ) -> None:
        """Relay the turn on bare ASGI and end it. Raises a domain error when no answer was begun.

        A turn that its agent could not begin runs on another agent, up to `MOST_MOVES` times. With a `recording` the
        turn goes on when its client is gone, and the answer is kept for it.
        """
        request_id = request_id_of(scope)
        answer = _ContinuedAnswer(send)
        tried: list[str] = []
        following: BegunTurn | None = turn
        while following is not None:
            turn = following
            note_ids(
                scope,
                user_id=turn.request.user_id,
                session_id=turn.session_id,
                agent_id=turn.endpoint.agent_id,
                turn=turn.placement.turn,
            )
            ending = _Ending(
                self._placements,
                turn,
                request_id,
                recording,
                may_move=turn.may_move and len(tried) < MOST_MOVES,
                answered=answer.begun,
            )
            tried.append(turn.endpoint.agent_id)
            following = await self._attempt(turn, ending, scope, receive, answer, tried)

    async def _attempt(
        self,
        turn: BegunTurn,
        ending: "_Ending",
        scope: Scope,
        receive: Receive,
        answer: "_ContinuedAnswer",
        tried: Sequence[str],
    ) -> BegunTurn | None:
        """Run the turn on its agent; return the turn that goes on elsewhere, if its agent could not begin it."""
        outcome = RelayOutcome()
        moved: BegunTurn | None = None
        try:
            try:
                if ending.recording is not None and len(tried) == 1:
                    await ending.recording.made(turn.session_id)
                outcome = await self._relayed(turn, ending, scope, receive, answer)
                failure = ending.refused
            except HypercoreError as error:
                failure = error
            if ending.refused is not None:
                moved = await asyncio.shield(self._tasks.start("move-turn", self._moved(turn, tried)))
            if failure is not None and moved is None:
                outcome.error = ending.explained(failure)
                if not answer.begun:
                    raise outcome.error
                await answer.end(encode(outcome.error.body(ending.request_id)))
        finally:
            if moved is None:
                await _to_its_end(self._tasks.start("end-turn", self._end(turn, ending, outcome)))
        return moved

    async def _relayed(
        self, turn: BegunTurn, ending: "_Ending", scope: Scope, receive: Receive, answer: "_ContinuedAnswer"
    ) -> RelayOutcome:
        span = span_of(scope)
        with self._silence.watching(turn.endpoint.agent_id) as control:
            return await self._relay.relay(
                scope,
                receive,
                answer.send,
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
                body=_placed(turn),
                limits=_limits(turn),
                observer=ending,
                on_disconnect=_on_disconnect(turn, ending.recording, begun=answer.begun),
                control=control,
            )

    async def _moved(self, turn: BegunTurn, tried: Sequence[str]) -> BegunTurn | None:
        """Place a turn on an agent that was not tried, and have its agent forget the session; None: there is none."""
        try:
            moved = await self._placements.move(turn, tried)
        except HypercoreError as error:
            _log.warning("turn.not_moved", session_id=turn.session_id, error=error.message)
            return None
        if moved is not None:
            before = turn.endpoint
            forgetting = self._client.delete_session(before.address, before.bearer, turn.session_id)
            self._tasks.start("forget-session", forgetting)
        return moved

    async def _end(self, turn: BegunTurn, ending: "_Ending", outcome: RelayOutcome) -> None:
        if ending.recording is not None:
            if outcome.error is not None and (outcome.error.details or {}).get("acted"):
                await ending.recording.failed_with(outcome.error, ending.request_id)
            await ending.recording.end(failed=True)  # unless it has ended well
        for pause in _ENDING_PAUSES:
            try:
                await ending.finish()
                break
            except Unavailable:
                await asyncio.sleep(pause)
        if ending.discards:
            await self._client.delete_session(turn.endpoint.address, turn.endpoint.bearer, turn.session_id)
        if isinstance(outcome.error, AgentUnreachable) and not ending.told_by_agent:
            _log.warning("turn.agent_unreachable", agent_id=turn.endpoint.agent_id, error=outcome.error.message)
            self._directory.forget(turn.endpoint.agent_id)
            self._wake(turn.endpoint.agent_id)
        status = outcome.error.status if outcome.error is not None else outcome.status
        label = "disconnected" if outcome.client_gone else status_class(status)
        self._metrics.turns.labels(label).inc()


class _Ending(Observer):
    """Ends the turn once, before the answer's last bytes or when the relay is over, whichever comes first."""

    def __init__(
        self,
        placements: Placements,
        turn: BegunTurn,
        request_id: str,
        recording: Recording | None,
        *,
        may_move: bool = False,
        answered: bool = False,
    ) -> None:
        """`may_move`: an agent that cannot begin the turn is not believed yet; `answered`: an earlier one told the
        client which session this is."""
        self.recording = recording
        self.refused: HypercoreError | None = None
        self.told_by_agent = False
        self._placements = placements
        self._turn = turn
        self.request_id = request_id
        self._acted = ActedWatch()
        self._may_move = may_move
        self._continues = self._answered = answered
        self._ended = False

    @property
    def discards(self) -> bool:
        """Whether the session ends with this turn: its first, and without an answer that names it."""
        return self._turn.is_first and not self._answered

    async def on_response(self, answer: UpstreamResponse) -> None:
        """Note whether the agent took the turn. Raises the agent's error where it is not to be passed on as it is."""
        if answer.status >= 400 and (self._continues or (self._may_move and answer.status in _AGENT_FAULTS)):
            retry_after = _seconds(answer.header.get("retry-after"))
            error = parse_error(await answer.peek(_ERROR_BYTES), retry_after=retry_after)
            if self._continues and error is None:
                error = AgentUnreachable(f"the agent answered with status {answer.status}")
            if error is not None and (self._continues or error.is_for_another_agent):
                raise self._refusal(error)
        self._answered = self._continues or answer.status < 400
        if self.recording is not None:
            self.recording.begin(answer.status, answer.header.get("content-type", ""))

    def chunk(self, data: bytes) -> bool:
        """Keep what passes, if it is to be kept. Raises the error of an agent that could not begin the turn."""
        if self._may_move:
            self._look_for_refusal(data)
        # An error of a turn that acted names its session, which stays.
        if not self._answered:
            self._acted.feed(data)
            self._answered = self._acted.found
        if self.recording is not None:
            self.recording.add(data)
        return False

    def _look_for_refusal(self, data: bytes) -> None:
        """Find the error that ends a stream of which only the turn's beginning was told."""
        if _REFUSED in data:
            name, said = _last_frame(data)
            if name == b"error" and (error := parse_error(said)) is not None and error.is_for_another_agent:
                raise self._refusal(error)
        elif data != KEEPALIVE and b"event: session\n" not in data:
            self._may_move = False

    def _refusal(self, error: HypercoreError) -> HypercoreError:
        self.told_by_agent = True
        if self._may_move and error.is_for_another_agent:
            self.refused = error
        self._answered = self._answered or (error.details or {}).get("acted") is True
        return error

    async def before_last(self) -> None:
        """End the turn, and the session too if nobody can know it."""
        if self.recording is not None:
            await self.recording.end()
        with contextlib.suppress(Unavailable):  # a store that does not answer now holds no answer back
            await self.finish()

    async def finish(self) -> None:
        """End the turn if it was not. Raises Unavailable when the store does not answer."""
        if not self._ended:
            await (self._placements.discard if self.discards else self._placements.end)(self._turn)
            self._ended = True

    def error_frame(self, error: HypercoreError) -> bytes:
        """Return the event with which a stream ends whose agent died; none while the turn may go on elsewhere."""
        if self.refused is not None:
            return b""
        return encode(self.explained(error).body(self.request_id))

    def explained(self, error: HypercoreError) -> HypercoreError:
        """Return the error; of a turn that may have begun at the agent, as one that is not to be repeated."""
        arrived = isinstance(error, AgentUnreachable | DeadlineExceeded) and (error.details or {}).get("sent", True)
        if self.told_by_agent or not arrived or (error.details or {}).get("acted"):
            return error
        return error.after_effects(None if self.discards else self._turn.session_id, self._turn.placement.turn)


class _ContinuedAnswer:
    """The answer to one request, of which several agents may write one part each. `begun`: its head was sent."""

    __slots__ = ("_send", "begun")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Pass a message on; the heads of later parts are dropped."""
        if message["type"] == "http.response.start":
            if self.begun:
                return
            self.begun = True
        await self._send(message)

    async def end(self, frame: bytes) -> None:
        """Send a last event. A client that has gone needs none."""
        with contextlib.suppress(OSError):
            await self._send({"type": "http.response.body", "body": frame})


async def _to_its_end(ending: "asyncio.Task[None]") -> None:
    """Wait for the end of a turn. One that is cancelled, since the manager stops, holds no client's answer back."""
    try:
        await asyncio.shield(ending)
    except asyncio.CancelledError:
        if not ending.cancelled():
            raise


def _last_frame(data: bytes) -> tuple[bytes, bytes]:
    """Return name and data of the last server-sent event in some bytes."""
    found = {b"event": b"", b"data": b""}
    for line in data.rstrip(b"\n").rpartition(b"\n\n")[2].split(b"\n"):
        name, _, value = line.partition(b": ")
        found[name] = value
    return found[b"event"], found[b"data"]


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isascii() and text.isdigit() else None


def _placed(turn: BegunTurn) -> bytes:
    fields = {**dict(turn.request), "session_id": turn.session_id, "placement": turn.placement}
    return PlacedChatRequest.model_construct(**fields).model_dump_json(exclude_none=True).encode()


def _on_disconnect(
    turn: BegunTurn, recording: Recording | None, *, begun: bool
) -> Literal["cancel", "drain", "drain_begun"]:
    if recording is not None:
        return "drain"
    if turn.request.on_disconnect == "interrupt":
        return "cancel"
    # who leaves a stream before its first event could neither follow the turn nor stop it: the session's id is in there
    return "drain_begun" if turn.request.stream and not begun else "drain"


def _limits(turn: BegunTurn) -> RequestLimits:
    whole = turn.placement.timeout + SLACK_SECONDS
    return RequestLimits(response=whole, idle=3 * KEEPALIVE_SECONDS, total=whole + SLACK_SECONDS)
