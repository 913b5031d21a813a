"""The compared scaling rules behind one interface: ours, upstream's and that of Kubernetes.

Each rule gets the same input: placed sessions (at most the capacity of the running agents), running agents, desired
agents.
"""

import math
from typing import Protocol

from hypercore_agents.autoscaler.policy import Observation, PolicySettings, PolicyState, decide

MINIMUM, MAXIMUM, SESSIONS = 10, 1000, 100


class Rule(Protocol):
    """A scaling rule and its state. `every` is its interval in seconds."""

    name: str
    every: int

    def size(self, now: int, age: int, seen: tuple[float, int] | None, wanted: int) -> int:
        """Return the new pool size; `seen` is (sessions, running agents) `age` seconds ago, None if unknown."""
        ...


class Ours:
    """`autoscaler/policy.py` with its defaults; it gets the measured spawn time, as in production."""

    def __init__(self, spawn_seconds: float, *, name: str = "ours", settings: PolicySettings | None = None) -> None:
        self.name = name
        self._settings = settings or PolicySettings()
        self.every = int(self._settings.interval)
        self._spawn_seconds = spawn_seconds
        self._state = PolicyState()

    def size(self, now: int, age: int, seen: tuple[float, int] | None, wanted: int) -> int:
        """Return the size that the policy decides on."""
        observed = None
        if seen is not None:
            observed = Observation(seen[0], seen[1], age=age, spawn_seconds=self._spawn_seconds)
        decision, self._state = decide(observed, wanted, self._settings, self._state, now)
        return decision.desired


class Upstream:
    """The rule of the upstream project: two thresholds, one jump, then a cooldown (2 and 5 minutes).

    Its serial start of one agent per second is omitted, in its favour.
    """

    name = "upstream"
    every = 30

    def __init__(self) -> None:
        self._changed = 0

    def size(self, now: int, age: int, seen: tuple[float, int] | None, wanted: int) -> int:
        """Compare with the thresholds."""
        if seen is None:
            return wanted
        sessions = seen[0]
        usage = sessions / (wanted * SESSIONS)
        desired = math.ceil(sessions / SESSIONS)
        if usage > 0.80 and wanted < MAXIMUM and now - self._changed >= 120:
            if usage > 0.90:
                desired = math.ceil(desired * 1.5)
            desired = min(MAXIMUM, math.ceil(desired * 1.2))
            desired = max(desired, wanted + 1)
        elif usage < 0.30 and wanted > MINIMUM and now - self._changed >= 300:
            desired = max(MINIMUM, math.ceil(desired * 1.2))
            if wanted - desired < 2:
                return wanted
        else:
            return wanted
        self._changed = now
        return desired


class Kubernetes:
    """HorizontalPodAutoscaler v2 with its documented algorithm and defaults and a target of 0.70.

    Every 15 s: ceil(replicas x usage / target), no change within 10%. Pods that are not ready count as unused and never
    turn an increase into a decrease. It grows by at most 100% or 4 pods per 15 s and shrinks to the highest result of
    the last 300 s.
    """

    name = "kubernetes"
    every = 15

    def __init__(self) -> None:
        self._results: list[tuple[int, int]] = []

    def size(self, now: int, age: int, seen: tuple[float, int] | None, wanted: int) -> int:
        """Apply the formula."""
        if seen is None:
            return wanted
        sessions, running = seen
        ratio = sessions / (wanted * SESSIONS * 0.70)
        result = wanted
        if abs(ratio - 1) > 0.10 and not (ratio < 1 and running < wanted):
            result = math.ceil(wanted * ratio)
        self._results = [(at, size) for at, size in self._results if at > now - 300]
        self._results.append((now, result))
        if result < wanted:
            result = min(wanted, max(size for _, size in self._results))
        most = max(2 * wanted, wanted + 4)
        return min(max(min(result, most), MINIMUM), MAXIMUM)
