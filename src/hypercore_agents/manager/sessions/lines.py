"""Who waits for a session's next turn in this process: a line per session, in the order in which they came.

Only the first of a line asks the store for the turn, so whoever came first is first; who did not want to wait is not
let past those who do. A session is one user's, so nobody stands in a line with another user's turns. Several manager
processes have a line each, whose first ones compete: in the order in which they came there, and in any order between.

Rejected: a table of those who wait. Every arrival and every end would write to the store, and a process that died
would hold the line up until its lease is over.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator


class Lines:
    """`on_moved` is told the session whose line has moved up."""

    def __init__(self, on_moved: Callable[[str], None]) -> None:
        self._lines: dict[str, deque[object]] = {}
        self._on_moved = on_moved

    def waits(self, session_id: str) -> bool:
        """Say whether anybody waits for a session."""
        return session_id in self._lines

    @contextlib.contextmanager
    def join(self, session_id: str) -> Iterator[Callable[[], bool]]:
        """Stand in a session's line; what is given says whether one is the first."""
        line = self._lines.setdefault(session_id, deque())
        place = object()
        line.append(place)
        try:
            yield lambda: line[0] is place
        finally:
            line.remove(place)
            if not line:
                del self._lines[session_id]
            self._on_moved(session_id)
