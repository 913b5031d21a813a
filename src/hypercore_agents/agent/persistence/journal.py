"""What a session tells: every event gets its id here, goes into the ring, and, unless it is a delta, to the store.

Deltas are gathered instead: what was said between two other events is one `text` in the log, under the last delta's id,
so that a reader has it either as deltas or as a whole; what is long for the ring is several. A `reset` is kept only
where it voids a text that was kept.

Ids are never used twice. A session that comes here goes on after the last id in the store (`goes_on`); whoever let it
go had nothing else (`Sessions.release`), or had an older generation. Where that last event is no end of a turn, its
agent was lost in mid-turn, and the log gets the `error` that the turn could not tell any more.
"""

import json
from collections.abc import Callable
from typing import cast

from hypercore_agents.agent.persistence import event_ring
from hypercore_agents.agent.persistence.event_ring import EventLog
from hypercore_agents.api.approvals import ApprovalRequest
from hypercore_agents.api.chat import ChatResponse
from hypercore_agents.api.errors import AgentUnreachable, ErrorBody
from hypercore_agents.api.events import (
    LOST_IN_MID_TURN,
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
"""What is left of an event that is too long for the log."""
_VOIDABLE = (ToolUse, ToolResult, SessionStarted)
_ENDS = (ChatResponse, ErrorBody)


class Journal:
    """One session's events on this agent. `keep` takes an event for the store; `soon` says that nothing follows it."""

    def __init__(self, generation: int, keep: Callable[[EventEntry, bool], None]) -> None:
        self.generation = generation
        self.ring = EventLog()
        self._keep = keep
        self._sequence = 0
        self._text: list[str] = []
        self._text_bytes = 0
        self._text_id: EventId = (0, 0)
        self._may_be_void = False
        self._cut_off = False
        self._asked = self._announced = False

    def goes_on(self, last: EventMark | None) -> str | None:
        """Count on after the store's last event, when the session has just come here.

        Returns what that event, which no turn has told since, says to the user.
        """
        if self._asked:
            return None
        self._asked = True
        self.ring.start = (0, 0)
        if last is not None:
            self.ring.start = (last.generation, last.sequence)
            if last.generation >= self.generation:
                self._sequence = last.sequence
            self._cut_off = last.name not in QUIET
        return None if last is None else last.notice

    def begin_turn(self) -> None:
        """Tell the end of an earlier turn that another agent was lost with."""
        if self._cut_off:
            self._cut_off = False
            self.say(AgentUnreachable(LOST_IN_MID_TURN).body(""))

    def say(self, event: EventData, *, kept: bool = False) -> tuple[str, bytes]:
        """Tell an event; return its id and its frame. `kept`: the store has it already, if it was announced."""
        if self._announced and not isinstance(event, _ENDS):
            self._sequence += 1  # the store may have the turn's end under that id
        kept = kept and self._announced
        self._announced, self.ring.ahead = False, None
        self._sequence += 1
        event_id = (self.generation, self._sequence)
        shown = show_id(event_id)
        frame = encode(event, shown)
        self.ring.add(event_id, frame)
        if isinstance(event, Delta):
            self._text.append(event.text)
            self._text_id = event_id
            self._text_bytes += len(frame)
            # The ring must not let go of what is not in the log yet; half of it is time for that to get there.
            if len(self._text) >= event_ring.EVENTS // 2 or self._text_bytes >= event_ring.SIZE // 2:
                self.flush()
        elif not kept:
            self._log(event, event_id)
        return shown, frame

    def announce(self, end: EventData) -> EventEntry:
        """Return a turn's last event as the log has it, under the id that it gets when it is said next.

        It is stored with the turn's transcript, so that a turn that the store acknowledged is never one without an end.
        """
        self._announced = True
        self.ring.ahead = (self.generation, self._sequence + 1)
        return _kept(end, self.ring.ahead)

    def flush(self) -> None:
        """Have the text that was said so far kept."""
        if self._text:
            text = "".join(self._text)
            self._drop_text()
            self._may_be_void = True
            self._entry(TextBlock(text=text), self._text_id)

    def _drop_text(self) -> None:
        self._text, self._text_bytes = [], 0

    def _log(self, event: EventData, event_id: EventId) -> None:
        if isinstance(event, Reset):
            self._drop_text()
            if self._may_be_void:
                self._entry(event, event_id)
            return
        self.flush()
        if isinstance(event, _VOIDABLE):
            self._may_be_void = False
        self._entry(event, event_id)

    def _entry(self, event: EventData, event_id: EventId) -> None:
        self._keep(_kept(event, event_id), isinstance(event, (*_ENDS, Notice)))


def _kept(event: EventData, event_id: EventId) -> EventEntry:
    data = event.model_dump_json(exclude_none=True)
    if len(data) > EVENT_LIMIT:
        data = shortened(event).model_dump_json(exclude_none=True)
    return EventEntry.model_construct(
        generation=event_id[0], sequence=event_id[1], name=cast("LoggedName", event_name(event)), data=data
    )


def shortened(event: EventData) -> EventData:
    """Return what the log holds of an event that is too long for it."""
    if isinstance(event, TextBlock):
        return TextBlock(text=event.text[:SHOWN_CHARACTERS], truncated=True)
    if isinstance(event, ChatResponse):
        notice = f"the log holds no more than {SHOWN_CHARACTERS} characters of this answer"
        changed = {"content": event.content[:SHOWN_CHARACTERS], "notices": [notice], "output": None}
        return event.model_copy(update=changed)
    if isinstance(event, ToolUse | ApprovalRequest):
        return event.model_copy(update={"input": {"left_out_characters": len(json.dumps(event.input))}})
    return Reset(reason="an event was too long for the log")


def gap(lost: EventEntry) -> EventEntry:
    """Return what stands in the log for events that could not be kept, the last of which is given."""
    data = Reset(reason="events could not be kept here").model_dump_json()
    return EventEntry.model_construct(generation=lost.generation, sequence=lost.sequence, name="reset", data=data)
