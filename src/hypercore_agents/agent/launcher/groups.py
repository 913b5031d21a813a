"""Control groups of sessions, below the one in which the agent runs; where none can be made, rlimits are what there is.

Under version 2 a group with groups below may hold no processes itself, so the launcher first moves itself (and so the
server, which it starts later) into one of its own beside the sessions'.
"""

from __future__ import annotations

import itertools
import os
from contextlib import suppress

from hypercore_agents.kit import cgroups

_PATIENCE = 2.0


class SessionGroups:
    """Makes a group per session. `limits` None: sessions get no groups."""

    def __init__(self, limits: cgroups.Limits | None) -> None:
        self._limits = limits
        self._cgroups: cgroups.Cgroups | None = None
        if limits is not None:
            with suppress(OSError):
                _step_aside()
                self._cgroups = cgroups.detect()
        self._scope = f"hypercore-{os.getpid()}"
        self._names: dict[str, str] = {}
        self._numbers = itertools.count(1)

    @property
    def enforced(self) -> frozenset[str]:
        """Which of "cores", "memory", "pids" are limited per session."""
        return self._cgroups.enforced if self._cgroups else frozenset()

    def of(self, session: str, uid: int) -> tuple[str, ...]:
        """Return the group's directories of a session, made if they are not there. Raises OSError."""
        if self._cgroups is None or self._limits is None:
            return ()
        if session not in self._names:
            # Numbered: a user may come back while the kernel still holds the group of the one before.
            name = f"{self._scope}-session-{uid}.{next(self._numbers)}"
            self._cgroups.create(name, self._limits)
            self._names[session] = name
        return self._cgroups.paths(self._names[session])

    def release(self, session: str) -> None:
        """Remove the groups of a session that runs nothing; what the kernel still holds goes with the agent's group."""
        name = self._names.pop(session, None)
        if self._cgroups is not None and name is not None:
            with suppress(OSError):
                cgroups.remove(self._cgroups.paths(name), patience=0.2)

    def close(self) -> None:
        """Remove what is left, at the launcher's end."""
        for session in list(self._names):
            self.release(session)


def _step_aside() -> None:
    """Leave our version 2 group to the groups below it, if that is where limits are set."""
    with open("/proc/self/cgroup") as file:
        own = [line.strip().split(":", 2)[2] for line in file if line.startswith("0::")]
    with open("/proc/self/mountinfo") as file:
        points = [line.split(" ")[4] for line in file if " - cgroup2 " in line]
    if not own or not points:
        return
    here = points[0] + (own[0] if own[0] != "/" else "")
    with open(f"{here}/cgroup.controllers") as file:
        if "memory" not in file.read().split():
            return
    aside = f"{here}/launcher"
    os.makedirs(aside, exist_ok=True)
    with open(f"{aside}/cgroup.procs", "w") as procs:
        procs.write("0")
