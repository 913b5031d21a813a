"""The plan of a load test: a number of users, each with its own session and timetable. Pure.

User `n` of `users` starts at `n / users * ramp_up` seconds and sends a prompt every `interval` seconds. A turn is timed
from the moment at which it is due, not from its sending: a platform that delays a user makes it wait, and timing from
the sending would omit that (coordinated omission). With `interval` 0 there is no timetable: each user sends the next
prompt after the answer, and a turn is timed from its sending.
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
        """The number of planned turns."""
        return self.users * self.requests

    @property
    def sessions_per_agent(self) -> int:
        """The number of sessions that each spawned agent must hold."""
        return math.ceil(self.users / max(1, self.agents))

    def start_of(self, user: int) -> float:
        """Return the start of a user, in seconds from the start of the run."""
        return self.ramp_up * user / self.users

    def due(self, user: int, request: int) -> float | None:
        """Return when a user's turn is due, in seconds from the start of the run; None: after the previous turn."""
        if request == 0:
            return self.start_of(user)
        return self.start_of(user) + request * self.interval if self.interval else None


def agents_for(users: int) -> int:
    """Return the number of agents that a number of users needs."""
    return math.ceil(users / SESSIONS_PER_AGENT)
