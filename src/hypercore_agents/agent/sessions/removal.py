"""Removes sessions from an agent: ends the turn, kills the CLI, releases the capacity slot, deletes the folder.

A session leaves the registry at once; its processes and folder follow. A session that comes back meanwhile, with a
higher generation, waits in `SessionFiles.wait_for_predecessor` until the earlier placement is removed.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

from hypercore_agents.agent.claude.context import AgentContext
from hypercore_agents.agent.claude.prewarmed import PrewarmedClis
from hypercore_agents.agent.sessions.capacity import LiveCapacity
from hypercore_agents.agent.sessions.session import Session
from hypercore_agents.api.errors import HypercoreError

_log = structlog.get_logger(__name__)


class SessionRemoval:
    """Removes sessions from `sessions`, the registry's dictionary."""

    def __init__(
        self,
        context: AgentContext,
        sessions: dict[str, Session],
        capacity: LiveCapacity,
        prewarmed: PrewarmedClis,
    ) -> None:
        self._context = context
        self._sessions = sessions
        self._capacity = capacity
        self._prewarmed = prewarmed
        self.in_progress: dict[str, asyncio.Future[bool]] = {}
        """By session id, the latest removal that is not finished. Its result says whether the folder was removed."""

    def remove_soon(self, session: Session, task_name: str) -> None:
        """Remove a session in the background."""
        self._context.tasks.start(task_name, self.remove(session))

    def remove(self, session: Session) -> Coroutine[Any, Any, None]:
        """Take a session out of the registry now; the returned coroutine removes the rest, and must be awaited."""
        earlier = self.in_progress.get(session.session_id)
        if session.has_ended:  # another session may have its id by now
            return _finished(earlier)
        removed = self._take_out(session)
        if session.turn is not None:
            session.turn.stop("deleted")
        session.cli.abort_start()
        return self._remove_rest(session, earlier, removed)

    def reuse_cli_soon(self, session: Session) -> None:
        """Remove a session whose CLI is unused, and offer that CLI to new sessions."""
        self._context.tasks.start("reuse", self._reuse_cli(session, self._take_out(session)))

    async def _reuse_cli(self, session: Session, removed: "asyncio.Future[bool]") -> None:
        try:
            unused = await session.take_unused()
            if unused is not None:
                self._capacity.release(session)
                await self._prewarmed.adopt(unused)
        except HypercoreError as error:
            unused = None
            _log.warning("session.cli_not_reused", session_id=session.session_id, error=error.message)
        if unused is None:
            await self._remove_rest(session, None, removed)
        else:
            self._finish(session, removed, True)

    def _take_out(self, session: Session) -> "asyncio.Future[bool]":
        """Take a session out of the registry; the future is done when everything of it is removed."""
        removed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.in_progress[session.session_id] = removed
        session.leave()
        self._context.approvals.forget(session.session_id)
        if self._sessions.get(session.session_id) is session:
            del self._sessions[session.session_id]
        return removed

    async def _remove_rest(
        self, session: Session, earlier: "asyncio.Future[bool] | None", removed: "asyncio.Future[bool]"
    ) -> None:
        folder_removed = False
        try:
            await _finished(earlier)
            await session.kill()
            self._capacity.release(session)
            await self._context.isolation.remove(session.files.folder)
            folder_removed = True
        finally:
            self._finish(session, removed, folder_removed)

    def _finish(self, session: Session, removed: "asyncio.Future[bool]", folder_removed: bool) -> None:
        removed.set_result(folder_removed)
        if self.in_progress.get(session.session_id) is removed:
            del self.in_progress[session.session_id]


async def _finished(future: "asyncio.Future[bool] | None") -> None:
    if future is not None:
        await asyncio.wait((future,))
