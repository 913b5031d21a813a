"""Following of an agent's log: the new lines of each poll. No I/O.

The server returns the bounded end of a log without a position, because a log is truncated at its beginning as it grows.
The new part of a poll is therefore the part after the longest overlap with the previous poll. For a truncated log that
repeats the same text, lines may be omitted. Lines are repeated only if the log no longer contains anything of the
previous poll; in this case the log was cut in the middle of a line, which is omitted.
"""

from hypercore_agents.api.agents import AgentState, AgentView

WINDOW = 262_144
"""Bytes of one poll: the maximum output between two polls without a gap."""

_MARK = 4096
_TRIES = 8
_ENDED = frozenset({AgentState.STOPPED, AgentState.FAILED})


class LogTail:
    """Turns polls of the end of a log into lines, each once; the first poll yields the last `lines` lines."""

    def __init__(self, lines: int) -> None:
        self._first: int | None = lines
        self._seen = b""
        self._partial = b""

    def feed(self, window: bytes) -> list[str]:
        """Return the new complete lines, without line ends."""
        new = beyond(self._seen, window)
        if new is None:
            before, new = [self._partial] if self._partial else [], window.partition(b"\n")[2]
        else:
            before, new = [], self._partial + new
        self._seen = window or self._seen
        *whole, self._partial = new.split(b"\n")
        if self._first is not None:
            whole, self._first = whole[max(0, len(whole) - self._first) :], None
        return [_text(line) for line in (*before, *whole)]

    def rest(self) -> list[str]:
        """Return the incomplete last line, if there is one, after the end of the log."""
        partial, self._partial = self._partial, b""
        return [_text(partial)] if partial else []


def beyond(before: bytes, now: bytes) -> bytes | None:
    """Return the part of `now` after its overlap with the earlier window `before`; None if they do not overlap."""
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
    # In a repetitive log the mark matches at every line: trying each match would take seconds.
    end = _overlap(before, now)
    return None if end < len(mark) else now[end:]


def _overlap(before: bytes, now: bytes) -> int:
    """Return the length of the longest prefix of `now` that is a suffix of `before` (Knuth, Morris and Pratt)."""
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


def has_ended(agent: AgentView) -> bool:
    """Return whether an agent has ended and prints nothing more."""
    return agent.status in _ENDED


def _text(line: bytes) -> str:
    return line.rstrip(b"\r").decode(errors="replace")
