"""Workers: child processes of the launcher for work that would block its loop."""

from __future__ import annotations

import json
import os
import sys

from hypercore_agents.agent.launcher import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Workers:
    """Starts workers and calls back when they end; the loop reports ended children to `reaped`."""

    def __init__(self) -> None:
        self._callbacks: dict[int, Callable[[bool], None]] = {}

    def start(
        self, work: Callable[[], object], ended: Callable[[bool], None], *, purpose: str, keep: tuple[int, ...] = ()
    ) -> None:
        """Run `work` in a child process and then call `ended`, with whether it succeeded. A failure is logged.

        `purpose` completes "cannot ..." in the log; `keep` are descriptors that stay open in the child.
        """
        pid = os.fork()
        if pid == 0:
            try:
                kernel.close_all_but({0, 1, 2, *keep})
                work()
                os._exit(0)
            except BaseException as error:
                warn(f"cannot {purpose}: {error}")
            finally:
                os._exit(1)
        self._callbacks[pid] = ended

    def reaped(self, pid: int, code: int) -> bool:
        """Handle the exit of a child process; return False if it was not a worker."""
        ended = self._callbacks.pop(pid, None)
        if ended is None:
            return False
        ended(code == 0)
        return True


def warn(text: str) -> None:
    """Write a warning to the agent's log."""
    print(json.dumps({"event": "launcher", "level": "warning", "message": text[:2000]}), file=sys.stderr, flush=True)  # noqa: T201
