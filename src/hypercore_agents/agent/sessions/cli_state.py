"""The states of one session's Claude CLI on this agent, and the only code that changes them.

    parked ◀──▶ admitted ──▶ starting ──▶ live
      │          │ ▲  ▲         │ │        │ │
      │          │ │  └─────────┘ │        │ │      the start failed
      │          │ └──────────────┼────────┘ │      the CLI has ended
      │          └────────────────┴──────────┴──▶ ending ──▶ ended
      └──────────────────────────────────────────────────────▶

`admitted`, `starting`, `live` and `ending` hold a capacity slot (`capacity.py`): a session holds its slot from before
its CLI starts until that CLI has ended. A live CLI may have died unnoticed (`ClaudeProcess.alive`); its session stays
live until its next use detects that. A session that leaves the agent is `ending` while its CLI may still run.

Rejected: flags ("resident", "starting", "ended") beside the process: two of them are enough to contradict each other.
"""

import asyncio
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from hypercore_agents.agent.claude.process import ClaudeProcess


class CliState(StrEnum):
    """State of a session's CLI."""

    PARKED = "parked"
    """No CLI and no capacity slot; the next turn resumes from the transcript."""
    ADMITTED = "admitted"
    """A capacity slot and no CLI: before a start, and after a CLI ended until the slot is released."""
    STARTING = "starting"
    LIVE = "live"
    ENDING = "ending"
    """The session has left this agent; its CLI, if any, is about to be killed, and no new one is started."""
    ENDED = "ended"


TRANSITIONS: Mapping[CliState, frozenset[CliState]] = {
    CliState.PARKED: frozenset({CliState.ADMITTED, CliState.ENDED}),
    CliState.ADMITTED: frozenset({CliState.PARKED, CliState.STARTING, CliState.ENDING}),
    CliState.STARTING: frozenset({CliState.ADMITTED, CliState.LIVE, CliState.ENDING}),
    CliState.LIVE: frozenset({CliState.ADMITTED, CliState.STARTING, CliState.ENDING}),
    CliState.ENDING: frozenset({CliState.ENDED}),
    CliState.ENDED: frozenset(),
}
HOLDS_SLOT = frozenset({CliState.ADMITTED, CliState.STARTING, CliState.LIVE, CliState.ENDING})
_GONE = frozenset({CliState.ENDING, CliState.ENDED})


class IllegalTransition(RuntimeError):
    """A defect: code requested a change of state that the table does not have."""


class CliStatus:
    """The state of a session's CLI, the start in progress and the connected process."""

    def __init__(self) -> None:
        self.state = CliState.PARKED
        self.holds_slot = False
        """Whether the session holds a capacity slot: derived from the state, and read for every session of an agent."""
        self.process: ClaudeProcess | None = None
        """The connected CLI. It outlives `live` only until a start or the session's end has killed it."""
        self.connecting: ClaudeProcess | None = None
        """The process that is being connected by the start in progress."""
        self.start_task: asyncio.Task[Any] | None = None

    @property
    def is_starting(self) -> bool:
        """Whether a CLI is being started, with or without a turn that waits for it."""
        return self.start_task is not None

    @property
    def is_running(self) -> bool:
        """Whether the session has a connected CLI that runs."""
        return self.process is not None and self.process.alive

    @property
    def has_ended(self) -> bool:
        """Whether the session has left this agent."""
        return self.state in _GONE

    def take_slot(self) -> None:
        """Record that the session received a capacity slot."""
        self._change(CliState.ADMITTED)

    def release_slot(self) -> None:
        """Release the capacity slot after the CLI has ended. Does nothing without a slot."""
        if self.state is CliState.ENDING:
            self._change(CliState.ENDED)
        elif self.holds_slot:
            self.start_failed()
            self._change(CliState.PARKED)

    def start_begins(self) -> None:
        """Record that a start begins; the caller sets `start_task` immediately afterwards."""
        self._change(CliState.STARTING)

    def connected(self, process: ClaudeProcess) -> None:
        """Record the connected CLI. In a session that is ending, it is killed next."""
        self.process = process
        if self.state is CliState.STARTING:
            self._change(CliState.LIVE)

    def start_failed(self) -> None:
        """Record that the start in progress, if any, failed."""
        if self.state is CliState.STARTING:
            self._change(CliState.ADMITTED)

    def start_done(self) -> None:
        """Record that the start's task is done, after a success or a failure."""
        self.start_task = None
        self.start_failed()

    def process_ended(self) -> None:
        """Record that the CLI has ended or belongs to another session now."""
        self.process = None
        if self.state is CliState.LIVE:
            self._change(CliState.ADMITTED)

    def end(self) -> None:
        """Record that the session leaves this agent. Idempotent."""
        if not self.has_ended:
            self._change(CliState.ENDING if self.holds_slot else CliState.ENDED)

    def _change(self, after: CliState) -> None:
        if after not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"a session's CLI cannot go from {self.state} to {after}")
        self.state = after
        self.holds_slot = after in HOLDS_SLOT
