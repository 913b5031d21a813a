"""Control of a relayed request from outside: add frames to its event stream, or end it with an error.

Added frames never split a relayed frame, because the relay passes on whole frames only, each in one write. The control
costs nothing per chunk.
"""

from typing import Protocol

from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.kit.relay.time_limit import TimeLimit


class ControlledResponse(Protocol):
    """The response that the relay is sending to the client."""

    @property
    def silent_seconds(self) -> float | None:
        """Seconds since the last bytes of the body arrived; None before the head has arrived."""
        ...

    def send_frame(self, frame: bytes) -> bool:
        """Send a frame to the client now; return whether that was possible."""
        ...


class RelayControl:
    """Controls one relayed request. Pass it to `Relay.relay`; before and after, its methods have no effect."""

    __slots__ = ("_limit", "_response", "error")

    def __init__(self) -> None:
        self.error: HypercoreError | None = None
        self._response: ControlledResponse | None = None
        self._limit: TimeLimit | None = None

    def attach(self, response: ControlledResponse, limit: TimeLimit) -> None:
        """Begin control; called by the relay."""
        self._response, self._limit = response, limit

    def detach(self) -> None:
        """End control; called by the relay."""
        self._response = self._limit = None

    @property
    def silent_seconds(self) -> float | None:
        """Seconds since the last bytes of the body arrived; None before the head and after the end."""
        return None if self._response is None else self._response.silent_seconds

    def send_frame(self, frame: bytes) -> bool:
        """Send a whole frame; return False if the response is not an event stream or the client does not read."""
        return self._response is not None and self._response.send_frame(frame)

    def fail(self, error: HypercoreError) -> None:
        """End the request with this error, as if the upstream had failed."""
        if self._limit is not None and self.error is None:
            self.error = error
            self._limit.set(0)
