"""Spares: connected CLIs that wait for a session, so that a new one does not wait for a start.

A spare has a folder, a user and namespaces of its own and a CLI session id, and belongs to nobody: its credential comes
with the session that takes it, outside of its namespaces. It is given only to a new session that asks for exactly the
options with which it was started; the model alone may differ, since a running CLI can change it.

Prewarmed CLIs start with the options that occur most often among the latest new sessions.
Options that carry text or servers must have been asked for by two users, or by the only one that this agent has seen.
Until the first session comes: what a request that says nothing gets.

Spares yield: they are started one at a time, only while no turn waits and no session's CLI starts, there are places
beyond them and memory allows, and they are ended as soon as the places or the memory are wanted. Whoever takes one has
a moment's start of its successor, which would take the processor from that session's first turn.
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
_REMEMBERED = 16
_PAUSE_AFTER_FAILURE = 5.0
_PAUSE_WITHOUT_SLOT = 1.0
_TRIES = 3
"""Starts in a row that may fail with the same options; then they are tried again only when a session asks for them."""
_NEVER = 1_000_000
"""Failures of options that the CLI refuses: they are not tried again."""
_TURN_SECONDS = 600.0
_HEAD_START = 0.25
"""Seconds; what a CLI computes between a first prompt and its first text is about half of that."""
_CHANGEABLE = {"model", "max_budget_usd"}
_PERSONAL = ("system_prompt", "mcp_servers", "allowed_tools", "disallowed_tools")


@dataclass(frozen=True)
class PrewarmedCli:
    """A connected CLI that nobody has yet."""

    options: SessionOptions
    folder: SessionFolder
    process: ClaudeProcess
    transcript: TranscriptPort

    @property
    def key(self) -> str:
        """What of its options a session must ask for to get it."""
        return _key(self.options)


class PrewarmedClis:
    """Keeps up to `target` prewarmed CLIs. `room` says how many processes beyond the sessions' may run now."""

    def __init__(self, context: AgentContext, target: int, room: Callable[[], int], tasks: Tasks) -> None:
        self.target = target
        self._context = context
        self._room = room
        self._tasks = tasks
        self._ready: list[PrewarmedCli] = []
        self._starting = 0
        self._wake = asyncio.Event()
        self._held_back = False
        self._recent: deque[tuple[str, str]] = deque(maxlen=_REMEMBERED)
        self._known: dict[str, SessionOptions] = {}
        self._wanted = SessionOptions()
        self._failures: dict[str, int] = {}
        if target > 0:
            context.start_limiter.on_calm = self._wake.set
            tasks.keep("prewarmed", self._settle, every=0.0)
            self._wake.set()

    @property
    def count(self) -> int:
        """Processes that are prewarmed, or becoming some."""
        return len(self._ready) + self._starting

    @property
    def gave_up(self) -> bool:
        """Whether the options that prewarmed CLIs are wanted for are not tried any more."""
        return self._failures.get(_key(self._wanted), 0) >= _TRIES

    def pids(self) -> list[int]:
        """Return the pids of the prewarmed CLIs."""
        return [spare.process.pid for spare in self._ready if spare.process.pid is not None]

    def has(self, options: SessionOptions) -> bool:
        """Say whether there is a spare for a new session with these options."""
        if options.approval_tools:
            return False
        key = _key(options)
        return any(spare.key == key and spare.process.alive for spare in self._ready)

    def take(self, options: SessionOptions, user_id: str) -> PrewarmedCli | None:
        """Return a spare for a new session with these options, None when there is none; it is the caller's then."""
        if self.target == 0 or options.approval_tools:
            return None
        key = _key(options)
        self._remember(key, options, user_id)
        if _TRIES <= self._failures.get(key, 0) < _NEVER:
            self._failures[key] = _TRIES - 1
        self._wake.set()
        for spare in self._ready:
            if spare.key == key and spare.process.alive:
                self._ready.remove(spare)
                if not self._held_back:  # many takers one after another do not put it off for ever
                    self._held_back = True
                    asyncio.get_running_loop().call_later(_HEAD_START, self._go_on)
                return spare
        return None

    def put_back(self, spare: PrewarmedCli) -> None:
        """Keep a spare for somebody else: whoever took it could not use it, and did not."""
        self._ready.append(spare)
        self._wake.set()

    def _go_on(self) -> None:
        self._held_back = False
        self._wake.set()

    async def adopt(self, spare: PrewarmedCli) -> None:
        """Keep a CLI that was started for a session which is over, if another one may want it; else end it."""
        if spare.key == _key(self._wanted) and self.count < min(self.target, self._room()):
            self._ready.append(spare)
        else:
            await self._end(spare)

    def refresh(self) -> None:
        """Look again at how many there may be."""
        self._wake.set()

    async def end(self) -> None:
        """End all of them."""
        self.target = 0
        while self._ready:
            await self._end(self._ready.pop())

    def _remember(self, key: str, options: SessionOptions, user_id: str) -> None:
        self._recent.append((key, user_id))
        self._known[key] = options
        users = {user for _, user in self._recent}
        for common, _ in Counter(key for key, _ in self._recent).most_common():
            askers = {user for key, user in self._recent if key == common}
            wanted = self._known[common]
            if len(askers) > 1 or len(users) == 1 or not any(getattr(wanted, name) for name in _PERSONAL):
                self._wanted = wanted
                break
        self._known = {key: self._known[key] for key, _ in self._recent}

    async def _settle(self) -> None:
        """Wait until something changed, then end and start prewarmed CLIs until there are as many as there may be."""
        await self._wake.wait()
        self._wake.clear()
        wanted = _key(self._wanted)
        for spare in [spare for spare in self._ready if spare.key != wanted or not spare.process.alive]:
            self._ready.remove(spare)
            await self._end(spare)
        while self._ready and len(self._ready) > max(0, self._room()):
            await self._end(self._ready.pop())
        may = self._context.start_limiter.calm and not self._held_back
        may = may and self._failures.get(wanted, 0) < _TRIES
        if may and len(self._ready) < min(self.target, self._room()):
            async with self._context.start_limiter.spare() as granted:
                failed = granted and not await self._start()
            if failed:  # a pause with the host's slot would hold up sessions of other agents
                await asyncio.sleep(_PAUSE_AFTER_FAILURE)
            if granted:
                self._wake.set()
            else:  # sessions of other agents start on this host
                asyncio.get_running_loop().call_later(_PAUSE_WITHOUT_SLOT, self._wake.set)

    async def _start(self) -> bool:
        """Start a spare; return whether it started."""
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
            _log.warning("spare.not_started", error=error.message)
            await context.isolation.remove(folder)
            return False
        except (ClaudeFailed, ClaudeRefused) as error:
            key = _key(options)
            failures = _NEVER if isinstance(error, ClaudeRefused) else self._failures.get(key, 0) + 1
            self._failures = {known: self._failures[known] for known in self._failures if known in self._known}
            self._failures[key] = failures
            _log.warning("spare.not_started", error=error.message, gives_up=failures >= _TRIES)
            await context.isolation.remove(folder)
            return False
        finally:
            self._starting = 0
        self._failures.pop(_key(options), None)
        _log.info("spare.started", duration_ms=round((time.perf_counter() - began) * 1000))
        spare = PrewarmedCli(options, folder, process, transcript)
        if self.target == 0:
            await self._end(spare)
        else:
            self._ready.append(spare)
        return True

    async def _end(self, spare: PrewarmedCli) -> None:
        await spare.process.kill()
        await self._context.isolation.remove(spare.folder)


def _key(options: SessionOptions) -> str:
    return options.model_dump_json(exclude=_CHANGEABLE, exclude_none=True)
