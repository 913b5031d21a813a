"""A streamed turn as it is read: from bytes to typed events, and where to take it up again. No I/O.

A stream ends with one `result` or `error`; what breaks off before can be followed further from the session's event log
(`/v1/agent/session/{id}/events/stream` with `Last-Event-ID`). So that there is something to follow, a streamed turn is
asked to go on without its client; a stream that its reader closes early interrupts it by a call of its own. Before the
first event of a new session nobody knows the id for that call: the server ends the turn of a client that goes so early.
What is left: an event that is on its way while its client goes is taken for read, and that turn goes on. Who passes
`on_disconnect` decides otherwise: with `interrupt` a lost connection ends the turn; with `continue` it goes on whatever
its reader does, once its first event is out.
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
from hypercore_agents.client.retry_policy import Retrying, Tries

LONGEST_FRAME = 64 * 1024 * 1024
SILENCE_SECONDS = 60.0
"""A stream that says nothing for so long is broken: a comment comes every 15 s."""
_LEAVING_SECONDS = 5.0


@dataclass(frozen=True)
class Event:
    """One event of a turn. `data` is the model that `api.events` names for it, or a dict for a name we do not know."""

    name: str
    data: EventData | dict[str, Any]
    id: str | None = None

    @property
    def text(self) -> str:
        """The text that a `delta` brings, or a `text`, as the log tells it; empty for every other event."""
        return self.data.text if isinstance(self.data, Delta | TextBlock) else ""


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
        try:
            if name == "error":
                self.ended = True
                raise error_in(json.loads(data))
            event = Event(name, decode(name, data) or json.loads(data), identity)
        except (ValueError, KeyError, TypeError) as error:
            self.ended = True
            raise self.lost(f"the event {name} is not as this client knows it; it may be too old") from error
        if isinstance(event.data, SessionStarted):
            self.session_id = event.data.session_id
        elif isinstance(event.data, ChatResponse):
            self.session_id, self.result, self.ended = event.data.session_id, event.data, True
        return event


class Pieces:
    """What `text()` yields of each event. It cannot take back what it gave, so a text that is told again must agree."""

    def __init__(self, reader: StreamReader) -> None:
        self._reader = reader
        self._given: list[str] = []
        self._again: str | None = None

    def of(self, event: Event) -> str:
        """Return what an event adds to the text. Raises StreamLost where what was given is not how the text is now."""
        if isinstance(event.data, Reset):
            self._again = ""
            return ""
        if isinstance(event.data, TextBlock) and event.data.truncated:
            raise self._reader.lost("the session's log holds only the beginning of a text that went by meanwhile")
        if not isinstance(event.data, Delta | TextBlock):
            if self._again is not None and self._given:
                raise self._differs()
            self._given, self._again = [], None
            return ""
        if self._again is None:
            self._given.append(event.text)
            return event.text
        self._again += event.text
        given = "".join(self._given)
        if not self._again.startswith(given):
            if not given.startswith(self._again):
                raise self._differs()
            return ""
        new, self._given, self._again = self._again[len(given) :], [self._again], None
        return new

    def _differs(self) -> StreamLost:
        return self._reader.lost("the answer began again in other words than those that `text()` has given")


class Following:
    """One streamed turn over as many connections as it takes: what to ask next, and how long to wait before."""

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
        self._ours_to_interrupt = "on_disconnect" not in options
        self._queues = dict(options).get("when_busy") == "queue"
        said = {"on_disconnect": "continue", **options}
        self._call = calls.chat(prompt, user_id, session_id, agent_id, said, stream=True)
        self._tries = Tries(retrying)
        self._asked = False
        self._left = False

    def next(self) -> tuple[Call[ChatResponse], Mapping[str, str]]:
        """Return the call that opens the next connection, and its headers: the turn itself, or where it broke off."""
        reader = self.reader
        said = {"Accept": "text/event-stream"}
        if reader.last_event_id is None or reader.session_id is None:
            self._asked = True
            return self._call, said
        reader.restart()
        again = Call("GET", calls.events(reader.session_id), ChatResponse)
        return again, {**said, "Last-Event-ID": reader.last_event_id}

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Yield the events that are whole now. Raises ServerError for an `error` event, Unreachable for an end."""
        if not chunk:
            raise Unreachable("the stream broke off", sent=True)
        for event in self.reader.feed(chunk):
            self._tries.reset()
            yield event

    def pause(self, error: Exception) -> float:
        """Return the seconds to wait before the next connection, or raise what ends the stream."""
        if self.reader.ended:
            raise error
        begun = self.reader.last_event_id is not None
        known = (
            error
            if isinstance(error, ServerError | Unreachable)
            else Unreachable(str(error) or type(error).__name__, sent=True)
        )
        if not begun and (isinstance(known, ServerError) or not known.sent):
            self._asked = False  # refused: a turn that runs in the session is somebody else's
        pause = self._tries.pause(known, repeatable=begun)
        if pause is not None:
            return pause
        if begun:
            raise self.reader.lost(f"the stream broke off and cannot be taken up again: {error}") from error
        raise known from error

    def abandoned(self) -> Call[InterruptResponse] | None:
        """Return the call to make for a stream that its reader leaves before the end, once; None: there is none."""
        reader = self.reader
        if self._left or not self._asked or reader.ended or not self._ours_to_interrupt or reader.session_id is None:
            return None
        if self._queues and reader.last_event_id is None:
            return None  # the turn that runs may be the one that this one waits for
        self._left = True
        return replace(calls.interrupt(reader.session_id), seconds=_LEAVING_SECONDS)

    def result(self) -> ChatResponse:
        """Return the result of a stream that was read to its end. Raises StreamLost for one that was closed before."""
        if self.reader.result is None:
            raise self.reader.lost("the stream was closed before its result")
        return self.reader.result
