"""A streamed turn as it is read: from bytes to typed events, and where to take it up again. No I/O.

A stream ends with one `result` or `error`; what breaks off before can be followed further from the session's event log
(`/v1/agent/session/{id}/events/stream` with `Last-Event-ID`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypercore_agents.api.chat import ChatResponse
from hypercore_agents.api.events import Delta, EventData, SessionStarted, decode
from hypercore_agents.client.errors import StreamLost, error_in

LONGEST_FRAME = 64 * 1024 * 1024


@dataclass(frozen=True)
class Event:
    """One event of a turn. `data` is the model that `api.events` names for it, or a dict for a name we do not know."""

    name: str
    data: EventData | dict[str, Any]
    id: str | None = None

    @property
    def text(self) -> str:
        """The piece of text that a `delta` brings; empty for every other event."""
        return self.data.text if isinstance(self.data, Delta) else ""


class StreamReader:
    """Reads one turn's frames as bytes come; remembers where it is."""

    def __init__(self, session_id: str | None = None) -> None:
        self.session_id = session_id
        self.last_event_id: str | None = None
        self.result: ChatResponse | None = None
        self.ended = False
        self._buffer = bytearray()

    def restart(self) -> None:
        """Forget the half frame that a broken connection left."""
        self._buffer.clear()

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Yield the events that are whole now. Raises ServerError for an `error` event."""
        self._buffer += chunk
        if len(self._buffer) > LONGEST_FRAME:
            raise self.lost("an event was longer than any that the platform sends")
        while not self.ended and (end := self._buffer.find(b"\n\n")) >= 0:
            frame = bytes(self._buffer[:end])
            del self._buffer[: end + 2]
            event = self._event(frame)
            if event is not None:
                yield event

    def lost(self, why: str) -> StreamLost:
        """Return the error for a stream that cannot go on."""
        return StreamLost(
            f"{why}; the session stays usable", session_id=self.session_id, last_event_id=self.last_event_id
        )

    def _event(self, frame: bytes) -> Event | None:
        name, identity, data = "message", None, b""
        for line in frame.split(b"\n"):
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"event":
                name = value.decode()
            elif field == b"id":
                identity = value.decode()
            elif field == b"data":
                data = data + b"\n" + value if data else value
        if not data:
            return None  # a comment that keeps the connection alive
        self.last_event_id = identity or self.last_event_id
        if name == "error":
            self.ended = True
            raise error_in(json.loads(data))
        event = Event(name, decode(name, data) or json.loads(data), identity)
        if isinstance(event.data, SessionStarted):
            self.session_id = event.data.session_id
        elif isinstance(event.data, ChatResponse):
            self.session_id, self.result, self.ended = event.data.session_id, event.data, True
        return event
