"""What a load test does: so many users, each with its own session and its own timetable. Pure.

User `n` of `users` begins at `n / users * ramp_up` seconds and asks every `interval` seconds. A turn is timed from the
moment when the timetable wanted it, not from when it was sent: a platform that makes a user late has made it wait, and
measuring from the sending would leave that out (coordinated omission). With `interval` 0 there is no timetable: each
user asks as soon as it has its answer, and a turn is timed from its sending.
"""

import math
from dataclasses import dataclass

SESSIONS_PER_AGENT = 100


@dataclass(frozen=True)
class Scenario:
    """One load test. `requests` is per user; times are in seconds; `agents` 0 means the pool."""

    users: int = 10
    requests: int = 5
    ramp_up: float = 5.0
    interval: float = 1.0
    prompt: str = "Hello! Say something short."
    agents: int = 0
    cores: int = 1
    memory: int = 2048
    timeout: float = 300.0

    @property
    def planned(self) -> int:
        """Turns in all."""
        return self.users * self.requests

    @property
    def sessions_per_agent(self) -> int:
        """Sessions that each spawned agent must hold."""
        return math.ceil(self.users / max(1, self.agents))

    def begins(self, user: int) -> float:
        """Return when a user begins, in seconds from the start."""
        return self.ramp_up * user / self.users

    def wanted(self, user: int, request: int) -> float | None:
        """Return when the timetable wants a user's turn, in seconds from the start; None: when the last has ended."""
        if request == 0:
            return self.begins(user)
        return self.begins(user) + request * self.interval if self.interval else None


def agents_for(users: int) -> int:
    """Return how many agents so many users need."""
    return math.ceil(users / SESSIONS_PER_AGENT)
