"""Whether this agent can start Claude CLIs, judged by the outcomes of its starts.

A start may fail because of what its session asks for, so failures of sessions prove nothing about the agent. After two
in a row the agent makes a start of its own, with nobody's options. Only if that fails too, the agent takes no turns: it
says so in its heartbeat, placement passes it over, and its sessions move. It checks again until a start succeeds.

Starts that were given up because they made no progress count neither way: on a busy host they say nothing about the
agent, and its replacement would wait for the same processors. Limits of a session or its user do not count either.

An agent of one user is judged by nobody, since its sessions cannot move.

Rejected: counting failures alone (one user's invalid options would end an agent); looking at the free disk (one of
many reasons, and not on all backends the one that matters).
"""

import asyncio
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from hypercore_agents.agent.claude.options import offer
from hypercore_agents.agent.claude.process import ClaudeFailed, ClaudeLimited
from hypercore_agents.agent.persistence.transcript import TranscriptPort
from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.api.options import SessionOptions

if TYPE_CHECKING:
    from hypercore_agents.agent.claude.context import AgentContext

_log = structlog.get_logger(__name__)
_TOLERATED = 2
_CHECK_SECONDS = 600.0


class StartReadiness:
    """Notes starts that succeeded and failed. `reason` says why no CLI starts here, None while some do."""

    def __init__(self, *, pause: float = 15.0) -> None:
        """Wait `pause` seconds between two checks of an agent that is not ready."""
        self.reason: str | None = None
        self.on_change: Callable[[], None] = lambda: None
        self._pause = pause
        self._failures = 0
        self._checking = False

    def succeeded(self) -> None:
        """Note a start that succeeded."""
        self._failures = 0
        self._set(None)

    def failed(self, error: Exception, context: "AgentContext") -> None:
        """Note a start that failed, and check the agent where that is one too many."""
        if type(error) is ClaudeFailed or isinstance(error, ClaudeLimited):
            return
        self._failures += 1
        if self._failures >= _TOLERATED and not self._checking and context.configuration.sessions_move:
            self._checking = True
            context.tasks.start("check-readiness", self._check(context))

    async def _check(self, context: "AgentContext") -> None:
        try:
            while (reason := await _why_no_start(context)) is not None:
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


async def _why_no_start(context: "AgentContext") -> str | None:
    """Start a CLI for nobody, and end it; return why that failed, None when it did not."""
    from hypercore_agents.agent.claude.start import start

    options = SessionOptions()
    offered = offer(options, context.configuration, separate=context.isolation.separate)
    folder = context.isolation.folder(str(uuid.uuid4()))
    try:
        process = await start(
            context, folder, options, offered, token="", user_id=None, resume=False, timeout=_CHECK_SECONDS,
            approvals=None, transcript=TranscriptPort(), judged=False,
        )  # fmt: skip
        await process.kill()
    except (HypercoreError, OSError) as error:
        if type(error) is ClaudeFailed:
            return None
        said = error.message if isinstance(error, HypercoreError) else str(error)
        return f"this agent cannot start the Claude CLI ({said}); its sessions move to another agent"
    finally:
        try:
            await context.isolation.remove(folder)
        except (HypercoreError, OSError) as error:
            _log.warning("agent.check_not_removed", error=str(error)[:300])
    return None
