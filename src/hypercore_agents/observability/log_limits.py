"""Rate limits for log lines that clients can cause at will, by kind of line, with a count of omitted lines.

Warnings, errors and access lines of rejected requests are limited; the volume of other lines is proportional to the
work done. A kind is an event with its outcome and its session, user or agent, so that a flood by one session does not
affect the lines of others. A kind may have `_BURST` lines at once and `_PER_SECOND` after that; all kinds together
`_BURST_IN_ALL` and `_IN_ALL_PER_SECOND`. Errors have their own total limit, so that a flood of rejections under many
names hides no error. The next line of a kind has the number of omitted lines as `left_out`. A flood that has ended is
reported by a line `log.left_out` some seconds later, when the next line of any kind is written.

Charges that could not be written (`ledger.…`) are never omitted, because only the log has them.

Rejected: a limit by level alone (a flood of rejections would hide a real error); a separate logger for access lines.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

_BURST, _PER_SECOND = 20.0, 0.5
_BURST_IN_ALL, _IN_ALL_PER_SECOND = 500.0, 20.0
_MAX_KINDS = 2000
_REPORT_AFTER = 10.0
_MAX_REPORTED = 20
_UNLIMITED = "ledger."
_SUBJECTS = ("session_id", "user_id", "caller", "agent_id")
_SUCCESSFUL = ("ok", "disconnected")


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
    """The filter for a log handler. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._kinds: dict[tuple[Any, ...], _Bucket] = {}
        self._all = _Bucket(_BURST_IN_ALL, clock())
        self._errors = _Bucket(_BURST_IN_ALL, clock())
        self._waiting: dict[tuple[Any, ...], _Bucket] = {}
        self._report_at = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is written."""
        now = self._clock()
        if self._waiting and now >= self._report_at:
            self._report_at = now + 1
            self._report(now)
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
                _add_count(record, bucket.left_out)
                bucket.left_out = 0
                self._waiting.pop(kind, None)
            return True
        bucket.left_out += 1
        self._waiting[kind] = bucket
        return False

    def _report(self, now: float) -> None:
        """Log how many lines were omitted in floods that have ended."""
        over = [(kind, bucket) for kind, bucket in self._waiting.items() if now - bucket.at >= _REPORT_AFTER]
        log = logging.getLogger(__name__)
        for kind, bucket in over[:_MAX_REPORTED]:
            log.warning("log.left_out: %d more lines like %s %s", bucket.left_out, kind[1], kind[2:])
        if rest := over[_MAX_REPORTED:]:
            count = sum(bucket.left_out for _, bucket in rest)
            log.warning("log.left_out: %d more lines of %d other kinds", count, len(rest))
        for kind, bucket in over:
            del self._waiting[kind]
            bucket.left_out = 0

    def _forget(self) -> None:
        """Forget the older half of the kinds if there are too many; the limit of all kinds together remains."""
        if len(self._kinds) > _MAX_KINDS:
            for kind in list(self._kinds)[: _MAX_KINDS // 2]:
                del self._kinds[kind]


def _kind_of(record: logging.LogRecord) -> tuple[Any, ...] | None:
    """Return the kind of a line, None if it is not limited."""
    if record.name == __name__:
        return None
    if not isinstance(record.msg, dict):
        return (record.name, str(record.msg)[:100]) if record.levelno >= logging.WARNING else None
    line = record.msg
    event, outcome = str(line.get("event")), line.get("outcome")
    if event.startswith(_UNLIMITED):
        return None
    refused = (event == "request" and outcome not in _SUCCESSFUL) or event.endswith(".refused")
    if record.levelno < logging.WARNING and not refused:
        return None
    subject = next((str(line[name]) for name in _SUBJECTS if line.get(name) is not None), "")
    return (record.name, event, str(outcome or line.get("status") or ""), subject)


def _add_count(record: logging.LogRecord, count: int) -> None:
    if isinstance(record.msg, dict):
        record.msg["left_out"] = count
    else:
        record.msg = f"{record.msg} ({count} more like this were left out)"
