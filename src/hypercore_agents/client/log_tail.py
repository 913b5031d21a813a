"""What a reader of an agent's log has seen, and what is new in the next look at it. No I/O.

The server gives the end of a log, bounded, and no place in it, since a log is cut at its beginning as it grows. So the
new part of a look is what goes beyond the longest overlap with the look before. A log that was cut and says the same
over and over may be told too short; nothing is ever told twice unless all that was seen is gone. Then
the log was cut in the middle of a line, which is left out.
"""

from hypercore_agents.api.agents import AgentState, AgentView

WINDOW = 262_144
"""Bytes of a look: what an agent may print between two looks without a gap."""

_MARK = 4096
_TRIES = 8
_OVER = frozenset({AgentState.STOPPED, AgentState.FAILED})


class Tail:
    """Turns looks at the end of a log into lines, each once; the first look gives the last `lines` of it."""

    def __init__(self, lines: int) -> None:
        self._first: int | None = lines
        self._seen = b""
        self._begun = b""

    def feed(self, look: bytes) -> list[str]:
        """Return the lines that are new and whole, without their ends."""
        new = beyond(self._seen, look)
        if new is None:
            before, new = [self._begun] if self._begun else [], look.partition(b"\n")[2]
        else:
            before, new = [], self._begun + new
        self._seen = look or self._seen
        *whole, self._begun = new.split(b"\n")
        if self._first is not None:
            whole, self._first = whole[max(0, len(whole) - self._first) :], None
        return [_said(line) for line in (*before, *whole)]

    def rest(self) -> list[str]:
        """Return the line that was begun and never ended, if there is one: the log is over."""
        begun, self._begun = self._begun, b""
        return [_said(begun)] if begun else []


def beyond(before: bytes, now: bytes) -> bytes | None:
    """Return what `now`, the end of a log, has beyond `before`, an earlier end of it; None: they do not overlap."""
    if now.startswith(before):
        return now[len(before) :]
    if not now:
        return b""
    mark = before[-_MARK:]
    at = now.rfind(mark)
    for _ in range(_TRIES):
        if at < 0:
            return None
        end = at + len(mark)
        if before.endswith(now[:end]):
            return now[end:]
        at = now.rfind(mark, 0, end - 1)
    # A log that says the same over and over has a place for the mark at every line: a try at each would take seconds.
    end = _overlap(before, now)
    return None if end < len(mark) else now[end:]


def _overlap(before: bytes, now: bytes) -> int:
    """Return how many bytes at the beginning of `now` are the end of `before`, at most (Knuth, Morris and Pratt)."""
    head = now[: len(before)]
    borders = [0] * len(head)
    length = 0
    for at in range(1, len(head)):
        while length and head[length] != head[at]:
            length = borders[length - 1]
        if head[length] == head[at]:
            length += 1
        borders[at] = length
    length = 0
    for byte in before[len(before) - len(head) :]:
        while length and head[length] != byte:
            length = borders[length - 1]
        if head[length] == byte:
            length += 1
    return length


def is_over(agent: AgentView) -> bool:
    """Say whether an agent will print nothing more."""
    return agent.status in _OVER


def _said(line: bytes) -> str:
    return line.rstrip(b"\r").decode(errors="replace")
