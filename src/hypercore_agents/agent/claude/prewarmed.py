"""Prewarmed CLIs: Claude CLIs that are started ahead of need, so that a new session does not wait for a start.

A prewarmed CLI has its own folder, user, namespaces and CLI session id, and no session. Its credential comes with the
session that takes it, and stays outside its namespaces. Only a new session that requests exactly the options it was
started with can take it; the model alone may differ, since a running CLI can change it.

Prewarmed CLIs start with the options that occur most often among the latest new sessions. Options that carry text or
servers must have been requested by two users, or by the only user of this agent. Before the first session, they start
with the default options.

Prewarmed CLIs yield to sessions. They start one at a time, only while no turn waits, no session's CLI starts and there
is capacity beyond the sessions; they end as soon as that capacity or their memory is needed. The successor of a taken
CLI starts after a short delay, because it would take processor time from that session's first turn.
"""

import asyncio
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from hypercore_agents.agent.claude.context import AgentContext
from hypercore_agents.agent.claude.options import Offer, offer
from hypercore_agents.agent.claude.process import ClaudeFailed, ClaudeProcess, ClaudeRefused
from hypercore_agents.agent.claude.start import start
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.agent.persistence.transcript import TranscriptPort
from hypercore_agents.api.errors import AtCapacity
from hypercore_agents.api.options import SessionOptions
from hypercore_agents.kit.aio.tasks import Tasks

_log = structlog.get_logger(__name__)
_REMEMBERED_SESSIONS = 16
_PAUSE_AFTER_FAILURE = 5.0
_PAUSE_WITHOUT_SLOT = 1.0
_MOST_FAILURES = 3
"""Failed starts in a row with the same options, after which these options wait until a session requests them."""
_REFUSED = 1_000_000
"""Failure count of options that the CLI refuses: they are not tried again."""
_TURN_SECONDS = 600.0
_SUCCESSOR_DELAY = 0.25
"""Seconds. A CLI computes for about half of that between a first prompt and its first text."""
_CHANGEABLE = {"model", "max_budget_usd"}
_PERSONAL = ("system_prompt", "mcp_servers", "allowed_tools", "disallowed_tools")


@dataclass(frozen=True)
class PrewarmedCli:
    """A connected CLI without a session."""

    options: SessionOptions
    folder: SessionFolder
    process: ClaudeProcess
    transcript: TranscriptPort

    @property
    def key(self) -> str:
        """The options that a session must request to take it, as one string."""
        return _key(self.options)


class PrewarmedClis:
    """Maintains up to `target` prewarmed CLIs. `capacity` returns how many processes may run beyond the sessions'."""

    def __init__(self, context: AgentContext, target: int, capacity: Callable[[], int], tasks: Tasks) -> None:
        self.target = target
        self._context = context
        self._capacity = capacity
        self._tasks = tasks
        self._ready: list[PrewarmedCli] = []
        self._starting = 0
        self._wake = asyncio.Event()
        self._delayed = False
        self._recent: deque[tuple[str, str]] = deque(maxlen=_REMEMBERED_SESSIONS)
        self._known: dict[str, SessionOptions] = {}
        self._wanted = SessionOptions()
        self._failures: dict[str, int] = {}
        if target > 0:
            context.start_limiter.on_idle = self._wake.set
            tasks.repeat("prewarmed", self._reconcile, every=0.0)
            self._wake.set()

    @property
    def count(self) -> int:
        """Number of prewarmed CLIs, including one that is starting."""
        return len(self._ready) + self._starting

    @property
    def gave_up(self) -> bool:
        """Whether starts with the current options have stopped because they fail."""
        return self._failures.get(_key(self._wanted), 0) >= _MOST_FAILURES

    def pids(self) -> list[int]:
        """Return the pids of the prewarmed CLIs."""
        return [cli.process.pid for cli in self._ready if cli.process.pid is not None]

    def has(self, options: SessionOptions) -> bool:
        """Return whether a prewarmed CLI exists for a new session with these options."""
        if options.approval_tools:
            return False
        key = _key(options)
        return any(cli.key == key and cli.process.alive for cli in self._ready)

    def take(self, options: SessionOptions, user_id: str) -> PrewarmedCli | None:
        """Remove and return a prewarmed CLI for a new session with these options, None when there is none."""
        if self.target == 0 or options.approval_tools:
            return None
        key = _key(options)
        self._remember(key, options, user_id)
        if _MOST_FAILURES <= self._failures.get(key, 0) < _REFUSED:
            self._failures[key] = _MOST_FAILURES - 1
        self._wake.set()
        for cli in self._ready:
            if cli.key == key and cli.process.alive:
                self._ready.remove(cli)
                if not self._delayed:  # later takers do not extend the delay
                    self._delayed = True
                    asyncio.get_running_loop().call_later(_SUCCESSOR_DELAY, self._end_delay)
                return cli
        return None

    def put_back(self, cli: PrewarmedCli) -> None:
        """Return a CLI that was taken and not used."""
        self._ready.append(cli)
        self._wake.set()

    async def adopt(self, cli: PrewarmedCli) -> None:
        """Retain the unused CLI of a session that has ended, if another session may need it; otherwise end it."""
        if cli.key == _key(self._wanted) and self.count < min(self.target, self._capacity()):
            self._ready.append(cli)
        else:
            await self._end(cli)

    def refresh(self) -> None:
        """Recompute how many prewarmed CLIs may exist."""
        self._wake.set()

    async def end(self) -> None:
        """End all prewarmed CLIs."""
        self.target = 0
        while self._ready:
            await self._end(self._ready.pop())

    def _end_delay(self) -> None:
        self._delayed = False
        self._wake.set()

    def _remember(self, key: str, options: SessionOptions, user_id: str) -> None:
        self._recent.append((key, user_id))
        self._known[key] = options
        users = {user for _, user in self._recent}
        for common, _ in Counter(key for key, _ in self._recent).most_common():
            requesters = {user for key, user in self._recent if key == common}
            wanted = self._known[common]
            if len(requesters) > 1 or len(users) == 1 or not any(getattr(wanted, name) for name in _PERSONAL):
                self._wanted = wanted
                break
        self._known = {key: self._known[key] for key, _ in self._recent}

    async def _reconcile(self) -> None:
        """Wait for a change, then end and start prewarmed CLIs until their number is correct."""
        await self._wake.wait()
        self._wake.clear()
        wanted = _key(self._wanted)
        for cli in [cli for cli in self._ready if cli.key != wanted or not cli.process.alive]:
            self._ready.remove(cli)
            await self._end(cli)
        while self._ready and len(self._ready) > max(0, self._capacity()):
            await self._end(self._ready.pop())
        allowed = self._context.start_limiter.idle and not self._delayed
        allowed = allowed and self._failures.get(wanted, 0) < _MOST_FAILURES
        if allowed and len(self._ready) < min(self.target, self._capacity()):
            async with self._context.start_limiter.prewarmed_slot() as granted:
                failed = granted and not await self._start()
            if failed:  # the pause holds no start slot, which sessions of other agents may need
                await asyncio.sleep(_PAUSE_AFTER_FAILURE)
            if granted:
                self._wake.set()
            else:  # sessions of other agents start on this host
                asyncio.get_running_loop().call_later(_PAUSE_WITHOUT_SLOT, self._wake.set)

    async def _start(self) -> bool:
        """Start a prewarmed CLI; return whether it started."""
        options, context = self._wanted, self._context
        offered: Offer = offer(options, context.configuration, separate=context.isolation.separate)
        folder = context.isolation.folder(str(uuid.uuid4()))
        transcript = TranscriptPort()
        self._starting = 1
        began = time.perf_counter()
        try:
            process = await start(
                context, folder, options, offered, token="", user_id=None, resume=False, timeout=_TURN_SECONDS,
                approvals=None, transcript=transcript,
            )  # fmt: skip
        except AtCapacity as error:
            _log.warning("prewarmed.not_started", error=error.message)
            await context.isolation.remove(folder)
            return False
        except (ClaudeFailed, ClaudeRefused) as error:
            key = _key(options)
            failures = _REFUSED if isinstance(error, ClaudeRefused) else self._failures.get(key, 0) + 1
            self._failures = {known: self._failures[known] for known in self._failures if known in self._known}
            self._failures[key] = failures
            _log.warning("prewarmed.not_started", error=error.message, gives_up=failures >= _MOST_FAILURES)
            await context.isolation.remove(folder)
            return False
        finally:
            self._starting = 0
        self._failures.pop(_key(options), None)
        _log.info("prewarmed.started", duration_ms=round((time.perf_counter() - began) * 1000))
        cli = PrewarmedCli(options, folder, process, transcript)
        if self.target == 0:
            await self._end(cli)
        else:
            self._ready.append(cli)
        return True

    async def _end(self, cli: PrewarmedCli) -> None:
        await cli.process.kill()
        await self._context.isolation.remove(cli.folder)


def _key(options: SessionOptions) -> str:
    return options.model_dump_json(exclude=_CHANGEABLE, exclude_none=True)
