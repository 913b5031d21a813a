"""What a hop sees of a relayed request: hooks on its response while it is relayed, and its outcome."""

from dataclasses import dataclass

from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.kit.relay.upstream import UpstreamResponse


class Observer:
    """Hooks on a relayed response. All of them do nothing; override the ones that you need."""

    async def on_response(self, response: UpstreamResponse) -> None:
        """See status and headers before they are passed on. A domain error raised here replaces the response."""
        return

    def chunk(self, data: bytes) -> bool:
        """See a chunk before it is passed on; return whether it contains the end of the response. Must be fast."""
        return False

    def last_frame_offset(self, frames: bytes) -> int:
        """Return where the last frame begins in frames for which `chunk` returned True.

        The frames before it are passed on without waiting for `before_last`.
        """
        return 0

    def end(self) -> HypercoreError | None:
        """Return, at the end of the body, the error if the response is incomplete, else None."""
        return None

    async def before_last(self) -> None:
        """Run before the last bytes are passed on. Called at most once per relayed response."""
        return

    def error_frame(self, error: HypercoreError) -> bytes:
        """Return the event that ends a failed event stream; empty for none."""
        return b""

    def headers(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return the headers to pass on, given those that may be passed on."""
        return headers

    @property
    def secret(self) -> bytes:
        """Bytes that must not appear in a body; each one is replaced by an asterisk. Empty: none."""
        return b""


@dataclass(slots=True)
class RelayOutcome:
    """How a relayed request ended. `status` is 0 if no response began."""

    status: int = 0
    sent_bytes: int = 0
    error: HypercoreError | None = None
    client_gone: bool = False
