"""Reading of a streamed turn: from bytes to typed events, and the position to resume from. No I/O.

A stream ends with one `result` or `error`. A stream that is cut off resumes from the session's event log
(`/v1/agent/session/{id}/events/stream` with `Last-Event-ID`). For this, the client requests `on_disconnect: continue`,
and a stream that is closed early interrupts its turn with a separate call. Before the first event of a new session the
client has no id for that call; in this case the server ends the turn when the client disconnects. One case remains: an
event that is in transit when the client disconnects counts as received, and that turn continues.

With an explicit `on_disconnect`, the caller decides: with `interrupt` a lost connection ends the turn; with `continue`
the turn continues after its first event, whether or not the stream is read.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hypercore_agents.api.chat import ChatResponse, InterruptResponse
from hypercore_agents.api.events import Delta, EventData, Reset, SessionStarted, TextBlock, decode
from hypercore_agents.client import calls
from hypercore_agents.client.calls import Call
from hypercore_agents.client.errors import ServerError, StreamLost, Unreachable, error_in
from hypercore_agents.client.retry_policy import Retries, Retrying

LONGEST_FRAME = 64 * 1024 * 1024
SILENCE_SECONDS = 60.0
"""A stream without any byte for this long is broken: the server sends a comment every 15 s."""
_INTERRUPT_SECONDS = 5.0


@dataclass(frozen=True)
class Event:
    """One event of a turn. `data` is its model in `api.events`, or a dict for an unknown event name."""

    name: str
    data: EventData | dict[str, Any]
    id: str | None = None

    @property
    def text(self) -> str:
        """The text of a `delta`, or of a `text` event from the log; empty for other events."""
        return self.data.text if isinstance(self.data, Delta | TextBlock) else ""


class StreamReader:
    """Parses the frames of one turn from bytes, and stores the position."""

    def __init__(self, session_id: str | None = None) -> None:
        self.session_id = session_id
        self.last_event_id: str | None = None
        self.result: ChatResponse | None = None
        self.ended = False
        self._buffer = bytearray()

    def restart(self) -> None:
        """Discard an incomplete frame of a broken connection."""
        self._buffer.clear()

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Yield the complete events. Raises ServerError for an `error` event."""
        self._buffer += chunk
        if len(self._buffer) > LONGEST_FRAME:
            raise self.lost("an event is longer than the maximum")
        while not self.ended and (end := self._buffer.find(b"\n\n")) >= 0:
            frame = bytes(self._buffer[:end])
            del self._buffer[: end + 2]
            event = self._event(frame)
            if event is not None:
                yield event

    def lost(self, why: str) -> StreamLost:
        """Return the error for a stream that cannot continue."""
        return StreamLost(
            f"{why}; the session remains usable", session_id=self.session_id, last_event_id=self.last_event_id
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
        try:
            if name == "error":
                self.ended = True
                raise error_in(json.loads(data))
            event = Event(name, decode(name, data) or json.loads(data), identity)
        except (ValueError, KeyError, TypeError) as error:
            self.ended = True
            raise self.lost(f"the event {name} has an unknown format; the client may be too old") from error
        if isinstance(event.data, SessionStarted):
            self.session_id = event.data.session_id
        elif isinstance(event.data, ChatResponse):
            self.session_id, self.result, self.ended = event.data.session_id, event.data, True
        return event


class TextPieces:
    """The pieces that `text()` yields. Yielded text cannot be withdrawn, so a repeated text must be identical."""

    def __init__(self, reader: StreamReader) -> None:
        self._reader = reader
        self._yielded: list[str] = []
        self._repeated: str | None = None

    def of(self, event: Event) -> str:
        """Return the text that an event adds. Raises StreamLost if the text differs from what was yielded."""
        if isinstance(event.data, Reset):
            self._repeated = ""
            return ""
        if isinstance(event.data, TextBlock) and event.data.truncated:
            raise self._reader.lost("the session's log holds only the beginning of a text that was missed")
        if not isinstance(event.data, Delta | TextBlock):
            if self._repeated is not None and self._yielded:
                raise self._differs()
            self._yielded, self._repeated = [], None
            return ""
        if self._repeated is None:
            self._yielded.append(event.text)
            return event.text
        self._repeated += event.text
        yielded = "".join(self._yielded)
        if not self._repeated.startswith(yielded):
            if not yielded.startswith(self._repeated):
                raise self._differs()
            return ""
        new, self._yielded, self._repeated = self._repeated[len(yielded) :], [self._repeated], None
        return new

    def _differs(self) -> StreamLost:
        return self._reader.lost("the answer restarted with a different text than `text()` has yielded")


class TurnStream:
    """One streamed turn over one or more connections: the next call, and the pause before it."""

    def __init__(
        self,
        prompt: str,
        user_id: str,
        session_id: str | None,
        agent_id: str | None,
        options: Mapping[str, Any],
        retrying: Retrying,
    ) -> None:
        self.reader = StreamReader(session_id)
        self._interrupts_when_left = "on_disconnect" not in options
        self._queues = dict(options).get("when_busy") == "queue"
        fields = {"on_disconnect": "continue", **options}
        self._call = calls.chat(prompt, user_id, session_id, agent_id, fields, stream=True)
        self._retries = Retries(retrying)
        self._requested = False
        self._interrupted = False

    def next(self) -> tuple[Call[ChatResponse], Mapping[str, str]]:
        """Return the call for the next connection and its headers: the turn itself, or its continuation."""
        reader = self.reader
        accept = {"Accept": "text/event-stream"}
        if reader.last_event_id is None or reader.session_id is None:
            self._requested = True
            return self._call, accept
        reader.restart()
        resume = Call("GET", calls.events(reader.session_id), ChatResponse)
        return resume, {**accept, "Last-Event-ID": reader.last_event_id}

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Yield the complete events. Raises ServerError for an `error` event, Unreachable at the end."""
        if not chunk:
            raise Unreachable("the stream was cut off", sent=True)
        for event in self.reader.feed(chunk):
            self._retries.reset()
            yield event

    def pause(self, error: Exception) -> float:
        """Return the seconds to wait before the next connection, or raise the error that ends the stream."""
        if self.reader.ended:
            raise error
        begun = self.reader.last_event_id is not None
        known = (
            error
            if isinstance(error, ServerError | Unreachable)
            else Unreachable(str(error) or type(error).__name__, sent=True)
        )
        if not begun and (isinstance(known, ServerError) or not known.sent):
            self._requested = False  # refused: a turn that runs in the session belongs to another client
        pause = self._retries.pause(known, repeatable=begun)
        if pause is not None:
            return pause
        if begun:
            raise self.reader.lost(f"the stream was cut off and cannot be resumed: {error}") from error
        raise known from error

    def interrupt_call(self) -> Call[InterruptResponse] | None:
        """Return the call that interrupts an unfinished turn; None if none is needed or it was returned before."""
        reader = self.reader
        if (
            self._interrupted
            or not self._requested
            or reader.ended
            or not self._interrupts_when_left
            or reader.session_id is None
        ):
            return None
        if self._queues and reader.last_event_id is None:
            return None  # the running turn may be another one that this turn waits for
        self._interrupted = True
        return replace(calls.interrupt(reader.session_id), seconds=_INTERRUPT_SECONDS)

    def result(self) -> ChatResponse:
        """Return the result of a complete stream. Raises StreamLost for a stream that was closed early."""
        if self.reader.result is None:
            raise self.reader.lost("the stream was closed before its result")
        return self.reader.result
