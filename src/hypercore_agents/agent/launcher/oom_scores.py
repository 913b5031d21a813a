"""OOM scores of launcher, server and sessions: which process the kernel kills when memory runs out (proc(5))."""

from __future__ import annotations

import os
from contextlib import suppress

RAISED = 1000
"""`oom_score_adj` of the processes of the users who hold most memory: the kernel kills these first."""


def lower_own() -> int:
    """Make launcher and server the agent's last processes to be killed; return the `oom_score_adj` of sessions."""
    own = "/proc/self/oom_score_adj"
    with suppress(OSError, ValueError), open(own) as file:
        current = int(file.read())
        write(os.getpid(), max(-900, current - 400))
        return min(RAISED - 200, current + 300)
    return 300


def write(pid: int, score: int) -> None:
    """Set a process's `oom_score_adj`; do nothing if it has ended or the kernel refuses."""
    with suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w") as file:
        file.write(str(score))
