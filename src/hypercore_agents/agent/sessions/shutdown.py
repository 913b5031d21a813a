"""Shuts down an agent's sessions: waits for turns, ends background jobs, stores changes, kills remaining processes."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable

import structlog

from hypercore_agents.agent.sessions.capacity import LiveCapacity
from hypercore_agents.agent.sessions.session import Session

_log = structlog.get_logger(__name__)
_AT_ONCE = 8
"""How many sessions are parked or killed at a time."""
LAST_ARCHIVES_SECONDS = 8.0
"""How long a drain may take to end background jobs and to archive workspaces."""
STORE_SECONDS = 2.0
"""How long a drain or a release waits until the store has a session's last events."""
_REASON = "its agent was shut down"


class Shutdown:
    """Ends the sessions of one agent. `interrupt_grace` is in seconds."""

    def __init__(
        self, sessions: Callable[[], Iterable[Session]], capacity: LiveCapacity, interrupt_grace: float
    ) -> None:
        self._sessions = sessions
        self._capacity = capacity
        self._interrupt_grace = interrupt_grace

    async def drain(self, grace: float) -> None:
        """Give running turns `grace` seconds, then interrupt them and wait for their end.

        Then end background jobs, archive the workspaces that changed since their last archive, as far as there is time,
        and send the last events to the store.
        """
        if not await self._turns_end(grace):
            for session in self._sessions():
                if session.turn is not None:
                    session.turn.stop("draining")
            await self._turns_end(2 * self._interrupt_grace)
        at_once = asyncio.Semaphore(_AT_ONCE)

        async def end_jobs(session: Session) -> None:
            while session.turn is not None:  # the turn is closing; its jobs are not known yet
                await self._capacity.wait_for_change()
            if session.jobs.running:
                async with at_once:
                    await self._capacity.park(session, _REASON)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_ARCHIVES_SECONDS):
                busy = [s for s in self._sessions() if s.jobs.running or s.turn is not None]
                await asyncio.gather(*map(end_jobs, busy))
                changed = [session for session in self._sessions() if session.files.archive.changed]
                await asyncio.gather(*(session.files.save() for session in changed))
        for session in self._sessions():
            session.end_jobs(_REASON)
        await asyncio.gather(*(session.mirror.wait_until_stored(STORE_SECONDS) for session in self._sessions()))

    async def kill_all(self) -> None:
        """Kill every process of every session."""
        at_once = asyncio.Semaphore(_AT_ONCE)

        async def kill(session: Session) -> None:
            async with at_once:
                if session.turn is not None:
                    session.turn.stop("draining")
                session.cli.abort_start()
                await session.kill()

        results = await asyncio.gather(*map(kill, self._sessions()), return_exceptions=True)
        for failed in (result for result in results if isinstance(result, Exception)):
            _log.error("session.not_closed", exc_info=failed)

    async def _turns_end(self, seconds: float) -> bool:
        """Wait until no turn runs; return False when that takes longer than `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while any(session.turn is not None for session in self._sessions()):
                    await self._capacity.wait_for_change()
        except TimeoutError:
            return False
        return True
