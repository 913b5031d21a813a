"""What may be said into an answer, or done to it, from outside while it is relayed.

A frame that `send_frame` adds goes between two whole frames of the relayed event stream: only whole frames pass,
and each in one write. Nothing here runs when a chunk passes.
"""

from typing import Protocol

from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.kit.relay.time_limit import TimeLimit


class PassingAnswer(Protocol):
    """An answer on its way to the client."""

    @property
    def silent_seconds(self) -> float | None:
        """How long nothing has come of the answer's body; None before its head has come."""
        ...

    def send_frame(self, frame: bytes) -> bool:
        """Send a frame to the client now; return whether that was possible."""
        ...


class RelayControl:
    """One relayed request. Give it to `Relay.relay`; it does nothing before and after."""

    __slots__ = ("_limit", "_passing", "error")

    def __init__(self) -> None:
        self.error: HypercoreError | None = None
        self._passing: PassingAnswer | None = None
        self._limit: TimeLimit | None = None

    def attach(self, passing: PassingAnswer, limit: TimeLimit) -> None:
        """Begin; the relay calls it."""
        self._passing, self._limit = passing, limit

    def detach(self) -> None:
        """End; the relay calls it."""
        self._passing = self._limit = None

    @property
    def silent_seconds(self) -> float | None:
        """How long nothing has come of the answer's body; None before its head has come, and when all is over."""
        return None if self._passing is None else self._passing.silent_seconds

    def send_frame(self, frame: bytes) -> bool:
        """Send a whole frame of our own; False where the answer is no event stream, or the client does not read."""
        return self._passing is not None and self._passing.send_frame(frame)

    def fail(self, error: HypercoreError) -> None:
        """End the request with this error, as if the other side had failed."""
        if self._limit is not None and self.error is None:
            self.error = error
            self._limit.set(0)
