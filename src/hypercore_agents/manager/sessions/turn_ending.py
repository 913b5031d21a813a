"""Observes the response of a turn while it is relayed, and ends the turn in the store.

The turn is ended before the last bytes of its response are sent, so that a client that has read the whole response can
begin the next turn at once. If the first turn of a session gets no response that contains the session's id, the session
is ended with the turn: no client has its id, and it would occupy a place without use.
"""

import contextlib

from hypercore_agents.api.errors import AgentUnreachable, DeadlineExceeded, HypercoreError, Unavailable, parse_error
from hypercore_agents.api.events import KEEPALIVE, encode
from hypercore_agents.kit.relay.relay import Observer, UpstreamResponse
from hypercore_agents.manager.idempotency import ActedWatch, Recording
from hypercore_agents.manager.sessions.turns import BegunTurn, Turns

_AGENT_FAULTS = frozenset((502, 503))
_ERROR_BYTES = 64 * 1024
_OTHER_AGENT = b'"other_agent":true'


class TurnEnding(Observer):
    """Ends one turn once: before the last bytes of its response, or when its relay ends, whichever comes first.

    `may_move`: another agent may run the turn if this one cannot begin it. `id_sent`: an earlier agent's part of the
    response has already sent the session's id to the client.
    """

    def __init__(
        self,
        turns: Turns,
        turn: BegunTurn,
        request_id: str,
        recording: Recording | None,
        *,
        may_move: bool = False,
        id_sent: bool = False,
    ) -> None:
        self.recording = recording
        self.request_id = request_id
        self.refused: HypercoreError | None = None
        """The agent's error, if it could not begin the turn and the turn may move."""
        self.is_agents_error = False
        """Whether the relay ended with an error that the agent sent, so the agent is reachable."""
        self._turns = turns
        self._turn = turn
        self._acted = ActedWatch()
        self._may_move = may_move
        self._continues = self._id_sent = id_sent
        self._ended = False

    @property
    def discards(self) -> bool:
        """Whether the session ends with this turn: its first, whose response does not contain its id."""
        return self._turn.is_first and not self._id_sent

    async def on_response(self, response: UpstreamResponse) -> None:
        """Record whether the agent accepted the turn. Raises the agent's error if it is not to be relayed as it is."""
        if response.status >= 400 and (self._continues or (self._may_move and response.status in _AGENT_FAULTS)):
            retry_after = _seconds(response.headers.get("retry-after"))
            error = parse_error(await response.peek(_ERROR_BYTES), retry_after=retry_after)
            if self._continues and error is None:
                error = AgentUnreachable(f"the agent responded with status {response.status}")
            if error is not None and (self._continues or error.is_for_another_agent):
                raise self._refusal(error)
        self._id_sent = self._continues or response.status < 400
        if self.recording is not None:
            self.recording.begin(response.status, response.headers.get("content-type", ""))

    def chunk(self, data: bytes) -> bool:
        """Record a chunk. Raises the error of an agent that could not begin the turn."""
        if self._may_move:
            self._detect_refusal(data)
        # The error of a turn that acted contains the session's id, so the session stays.
        if not self._id_sent:
            self._acted.feed(data)
            self._id_sent = self._acted.found
        if self.recording is not None:
            self.recording.add(data)
        return False

    def _detect_refusal(self, data: bytes) -> None:
        """Detect an error that ends a stream after nothing but the `session` event."""
        if _OTHER_AGENT in data:
            name, body = _last_frame(data)
            if name == b"error" and (error := parse_error(body)) is not None and error.is_for_another_agent:
                raise self._refusal(error)
        elif data != KEEPALIVE and b"event: session\n" not in data:
            self._may_move = False

    def _refusal(self, error: HypercoreError) -> HypercoreError:
        self.is_agents_error = True
        if self._may_move and error.is_for_another_agent:
            self.refused = error
        self._id_sent = self._id_sent or (error.details or {}).get("acted") is True
        return error

    async def before_last(self) -> None:
        """End the turn, and the session too if no client has its id."""
        if self.recording is not None:
            await self.recording.end()
        with contextlib.suppress(Unavailable):  # an unavailable store must not delay the response
            await self.finish()

    async def finish(self) -> None:
        """End the turn, unless it has been ended. Raises Unavailable."""
        if not self._ended:
            await (self._turns.discard if self.discards else self._turns.end)(self._turn)
            self._ended = True

    def error_frame(self, error: HypercoreError) -> bytes:
        """Return the last event of a stream whose agent failed; empty while the turn may move to another agent."""
        if self.refused is not None:
            return b""
        return encode(self.explained(error).body(self.request_id))

    def explained(self, error: HypercoreError) -> HypercoreError:
        """Return the error, marked as not retryable if the agent may have begun the turn."""
        arrived = isinstance(error, AgentUnreachable | DeadlineExceeded) and (error.details or {}).get("sent", True)
        if self.is_agents_error or not arrived or (error.details or {}).get("acted"):
            return error
        return error.after_effects(None if self.discards else self._turn.session_id, self._turn.placement.turn)


def _last_frame(data: bytes) -> tuple[bytes, bytes]:
    """Return name and data of the last server-sent event in a chunk."""
    found = {b"event": b"", b"data": b""}
    for line in data.rstrip(b"\n").rpartition(b"\n\n")[2].split(b"\n"):
        name, _, value = line.partition(b": ")
        found[name] = value
    return found[b"event"], found[b"data"]


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isascii() and text.isdigit() else None
