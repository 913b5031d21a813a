"""The journal of a session: gives every event its id, adds it to the ring, and queues it for the log in the store.

Deltas are not logged one by one. The text between two other events becomes one `text` event in the log, under the id of
its last delta, so that a reader gets the text either as deltas or as a whole. A text that is too long for the ring
becomes several. A `reset` is logged only where it voids a text that was logged.

Ids are never reused. A session that is placed here continues after the last id in the store (`continue_after`): its
previous agent had nothing else (`Sessions.release`) or had an older generation. If that last event is not the end of a
turn, the agent was lost during it, and the log gets the `error` that the turn could not publish.
"""

import json
from collections.abc import Callable
from typing import cast

from hypercore_agents.agent.persistence import event_ring
from hypercore_agents.agent.persistence.event_ring import EventRing
from hypercore_agents.api.approvals import ApprovalRequest
from hypercore_agents.api.chat import ChatResponse
from hypercore_agents.api.errors import AgentUnreachable, ErrorBody
from hypercore_agents.api.events import (
    LOST_DURING_TURN,
    QUIET,
    Delta,
    EventData,
    EventId,
    Notice,
    Reset,
    SessionStarted,
    TextBlock,
    ToolResult,
    ToolUse,
    encode,
    event_name,
    show_id,
)
from hypercore_agents.api.internal import EVENT_LIMIT, EventEntry, EventMark, LoggedName

SHOWN_CHARACTERS = 200_000
"""How much of an event that is too long for the log is logged."""
_VOIDABLE = (ToolUse, ToolResult, SessionStarted)
_ENDS = (ChatResponse, ErrorBody)


class Journal:
    """One session's events on this agent. `log(entry, soon)` queues an event; `soon`: send it without delay."""

    def __init__(self, generation: int, log: Callable[[EventEntry, bool], None]) -> None:
        self.generation = generation
        self.ring = EventRing()
        self._log = log
        self._sequence = 0
        self._text: list[str] = []
        self._text_bytes = 0
        self._text_id: EventId = (0, 0)
        self._may_be_void = False
        self._previous_turn_lost = False
        self._continued = self._announced = False

    def continue_after(self, last: EventMark | None) -> str | None:
        """Continue after the store's last event, when the session has just been placed here. Later calls do nothing.

        Returns the text of that event if it is a notice, which no turn's answer has contained since.
        """
        if self._continued:
            return None
        self._continued = True
        self.ring.start = (0, 0)
        if last is not None:
            self.ring.start = (last.generation, last.sequence)
            if last.generation >= self.generation:
                self._sequence = last.sequence
            self._previous_turn_lost = last.name not in QUIET
        return None if last is None else last.notice

    def begin_turn(self) -> None:
        """Log the end of an earlier turn that was lost with another agent."""
        if self._previous_turn_lost:
            self._previous_turn_lost = False
            self.publish(AgentUnreachable(LOST_DURING_TURN).body(""))

    def publish(self, event: EventData, *, stored: bool = False) -> tuple[str, bytes]:
        """Publish an event; return its id and its frame. `stored`: the store has it already, if it was announced."""
        if self._announced and not isinstance(event, _ENDS):
            self._sequence += 1  # the store may have the turn's end under that id
        stored = stored and self._announced
        self._announced, self.ring.announced = False, None
        self._sequence += 1
        event_id = (self.generation, self._sequence)
        shown_id = show_id(event_id)
        frame = encode(event, shown_id)
        self.ring.add(event_id, frame)
        if isinstance(event, Delta):
            self._text.append(event.text)
            self._text_id = event_id
            self._text_bytes += len(frame)
            # The ring must not drop what is not in the log yet; half of the ring leaves time for that.
            if len(self._text) >= event_ring.EVENTS // 2 or self._text_bytes >= event_ring.SIZE // 2:
                self.flush()
        elif not stored:
            self._log_event(event, event_id)
        return shown_id, frame

    def announce(self, end: EventData) -> EventEntry:
        """Return the log entry of a turn's last event, under the id that it will get when it is published next.

        It is stored with the turn's transcript, so that no turn that the store has acknowledged lacks its end.
        """
        self._announced = True
        self.ring.announced = (self.generation, self._sequence + 1)
        return _entry(end, self.ring.announced)

    def flush(self) -> None:
        """Log the text that was collected so far."""
        if self._text:
            text = "".join(self._text)
            self._drop_text()
            self._may_be_void = True
            self._queue(TextBlock(text=text), self._text_id)

    def _drop_text(self) -> None:
        self._text, self._text_bytes = [], 0

    def _log_event(self, event: EventData, event_id: EventId) -> None:
        if isinstance(event, Reset):
            self._drop_text()
            if self._may_be_void:
                self._queue(event, event_id)
            return
        self.flush()
        if isinstance(event, _VOIDABLE):
            self._may_be_void = False
        self._queue(event, event_id)

    def _queue(self, event: EventData, event_id: EventId) -> None:
        self._log(_entry(event, event_id), isinstance(event, (*_ENDS, Notice)))


def _entry(event: EventData, event_id: EventId) -> EventEntry:
    data = event.model_dump_json(exclude_none=True)
    if len(data) > EVENT_LIMIT:
        data = shortened(event).model_dump_json(exclude_none=True)
    return EventEntry.model_construct(
        generation=event_id[0], sequence=event_id[1], name=cast("LoggedName", event_name(event)), data=data
    )


def shortened(event: EventData) -> EventData:
    """Return what is logged of an event that is too long for the log."""
    if isinstance(event, TextBlock):
        return TextBlock(text=event.text[:SHOWN_CHARACTERS], truncated=True)
    if isinstance(event, ChatResponse):
        notice = f"the log has only the first {SHOWN_CHARACTERS} characters of this answer"
        changed = {"content": event.content[:SHOWN_CHARACTERS], "notices": [notice], "output": None}
        return event.model_copy(update=changed)
    if isinstance(event, ToolUse | ApprovalRequest):
        return event.model_copy(update={"input": {"left_out_characters": len(json.dumps(event.input))}})
    return Reset(reason="an event was too long for the log")


def gap(lost: EventEntry) -> EventEntry:
    """Return the log entry that replaces events which could not be stored; `lost` is the last of them."""
    data = Reset(reason="events could not be stored here").model_dump_json()
    return EventEntry.model_construct(generation=lost.generation, sequence=lost.sequence, name="reset", data=data)
