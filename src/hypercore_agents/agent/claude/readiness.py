"""Whether this agent can start Claude CLIs, judged by the outcomes of its starts.

A start may fail because of its session's options, so failed starts of sessions alone prove nothing about the agent.
After two failures in a row the agent runs a trial start with default options. If the trial fails too, the agent is
not ready: it reports that in its heartbeat, it takes no turns, and its sessions move to other agents. The trial is
repeated until it succeeds.

Some failures do not count: a start that was given up for lack of progress (on a busy host that proves nothing, and a
replacement would compete for the same processors), and a start that reached a limit of its session or user.

An agent of one user is never judged, since its sessions cannot move; its server does not call `enable_trials`.

Rejected: counting failures alone (one user's invalid options would take an agent out of service); checking the free
disk space (one of many causes, and not the decisive one on every backend).
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from hypercore_agents.agent.claude.process import ClaudeFailed, ClaudeLimited
from hypercore_agents.kit.aio.tasks import Tasks

_log = structlog.get_logger(__name__)
_TOLERATED_FAILURES = 2

TrialStart = Callable[[], Awaitable[str | None]]
"""Starts and ends a CLI with default options; returns the reason of a failure, None after a success."""


class StartReadiness:
    """Records successful and failed starts. `reason`: why no CLI starts here, None while the agent is ready."""

    def __init__(self, *, pause: float = 15.0) -> None:
        """Wait `pause` seconds between two trial starts of an agent that is not ready."""
        self.reason: str | None = None
        self.on_change: Callable[[], None] = lambda: None
        self._pause = pause
        self._failures = 0
        self._trial: TrialStart | None = None
        self._tasks: Tasks | None = None
        self._checking = False

    def enable_trials(self, trial: TrialStart, tasks: Tasks) -> None:
        """Judge the agent by `trial` from now on, in a task of `tasks`."""
        self._trial, self._tasks = trial, tasks

    def succeeded(self) -> None:
        """Record a start that succeeded."""
        self._failures = 0
        self._set(None)

    def failed(self, error: Exception) -> None:
        """Record a start that failed, and begin trial starts after too many failures in a row."""
        if type(error) is ClaudeFailed or isinstance(error, ClaudeLimited):
            return
        self._failures += 1
        if self._trial is None or self._tasks is None or self._checking or self._failures < _TOLERATED_FAILURES:
            return
        self._checking = True
        self._tasks.start("check-readiness", self._check(self._trial))

    async def _check(self, trial: TrialStart) -> None:
        try:
            while (reason := await trial()) is not None:
                self._set(reason)
                await asyncio.sleep(self._pause)
            self.succeeded()
        finally:
            self._checking = False

    def _set(self, reason: str | None) -> None:
        changed = (reason is None) != (self.reason is None)
        self.reason = reason
        if changed:
            _log.warning("agent.readiness", ready=reason is None, reason=reason)
            self.on_change()
