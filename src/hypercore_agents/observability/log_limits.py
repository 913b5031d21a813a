"""A limit on log lines that somebody outside can cause at will, by kind, with a count of what was left out.

Limited are warnings, errors and access lines of refused requests; the rest is in proportion to work that was done. A
kind is the event with its outcome and whoever is named in it (session, user, agent), so that one session's flood leaves
the lines of others alone. A kind has `_BURST` lines at once and `_PER_SECOND` after that; all kinds together have
`_BURST_IN_ALL` and `_IN_ALL_PER_SECOND`. Errors have such a limit of their own, so that a flood of refusals under many
names hides none. The next line of a kind says how many were left out, as `left_out`; of a flood that has ended, a line
`log.left_out` says it some seconds later, with the next line of any kind.

Never left out: charges that could not be written (`ledger.…`), since the log is then all that has them.

Rejected: a limit by level alone (a flood of refusals would hide one real error); a logger of its own for access lines.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

_BURST, _PER_SECOND = 20.0, 0.5
_BURST_IN_ALL, _IN_ALL_PER_SECOND = 500.0, 20.0
_MOST_KINDS = 2000
_TOLD_AFTER = 10.0
_MOST_TOLD = 20
_NEVER = "ledger."
_WHO = ("session_id", "user_id", "caller", "agent_id")
_FINE = ("ok", "disconnected")


class _Bucket:
    __slots__ = ("at", "left_out", "tokens")

    def __init__(self, tokens: float, at: float) -> None:
        self.tokens = tokens
        self.at = at
        self.left_out = 0

    def take(self, now: float, burst: float, rate: float) -> bool:
        self.tokens = min(burst, self.tokens + (now - self.at) * rate)
        self.at = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class LogLimits(logging.Filter):
    """A filter for a handler. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._kinds: dict[tuple[Any, ...], _Bucket] = {}
        self._all = _Bucket(_BURST_IN_ALL, clock())
        self._errors = _Bucket(_BURST_IN_ALL, clock())
        self._waiting: dict[tuple[Any, ...], _Bucket] = {}
        self._look_at = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether the line is written."""
        now = self._clock()
        if self._waiting and now >= self._look_at:
            self._look_at = now + 1
            self._tell(now)
        kind = _kind_of(record)
        if kind is None:
            return True
        bucket = self._kinds.get(kind)
        if bucket is None:
            bucket = self._kinds[kind] = _Bucket(_BURST, now)
            self._forget()
        in_all = self._errors if record.levelno >= logging.ERROR else self._all
        if bucket.take(now, _BURST, _PER_SECOND) and in_all.take(now, _BURST_IN_ALL, _IN_ALL_PER_SECOND):
            if bucket.left_out:
                _say(record, bucket.left_out)
                bucket.left_out = 0
                self._waiting.pop(kind, None)
            return True
        bucket.left_out += 1
        self._waiting[kind] = bucket
        return False

    def _tell(self, now: float) -> None:
        """Say how many lines of floods that have ended were left out."""
        over = [(kind, bucket) for kind, bucket in self._waiting.items() if now - bucket.at >= _TOLD_AFTER]
        log = logging.getLogger(__name__)
        for kind, bucket in over[:_MOST_TOLD]:
            log.warning("log.left_out: %d more lines like %s %s", bucket.left_out, kind[1], kind[2:])
        if rest := over[_MOST_TOLD:]:
            count = sum(bucket.left_out for _, bucket in rest)
            log.warning("log.left_out: %d more lines of %d other kinds", count, len(rest))
        for kind, bucket in over:
            del self._waiting[kind]
            bucket.left_out = 0

    def _forget(self) -> None:
        """Let go of the older half of the kinds where there are too many; the limit of all kinds together stays."""
        if len(self._kinds) > _MOST_KINDS:
            for kind in list(self._kinds)[: _MOST_KINDS // 2]:
                del self._kinds[kind]


def _kind_of(record: logging.LogRecord) -> tuple[Any, ...] | None:
    """Return what kind a line is of; None for one that is not limited."""
    if record.name == __name__:
        return None
    if not isinstance(record.msg, dict):
        return (record.name, str(record.msg)[:100]) if record.levelno >= logging.WARNING else None
    line = record.msg
    event, outcome = str(line.get("event")), line.get("outcome")
    if event.startswith(_NEVER):
        return None
    refused = (event == "request" and outcome not in _FINE) or event.endswith(".refused")
    if record.levelno < logging.WARNING and not refused:
        return None
    who = next((str(line[name]) for name in _WHO if line.get(name) is not None), "")
    return (record.name, event, str(outcome or line.get("status") or ""), who)


def _say(record: logging.LogRecord, count: int) -> None:
    if isinstance(record.msg, dict):
        record.msg["left_out"] = count
    else:
        record.msg = f"{record.msg} ({count} more like this were left out)"
