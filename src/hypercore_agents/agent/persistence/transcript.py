"""A session's transcript, kept outside of the agent while the Claude CLI writes it, and brought back in another agent.

`TranscriptPort` is the Agent SDK's session store, `TranscriptMirror` what is behind it. Its `append` only queues, so
that neither CLI nor turn waits for the network; one task per session sends what is queued to the gateway, in order,
again and again until it is taken. The session's events (`journal.py`) go the same way in the same requests; what
comes in mid-turn waits a little for more.
An entry is known by its uuid, so that one which was sent twice is kept once.

All that comes from the CLI may have been forged by a tool: the session id is the server's own whatever a frame says, a
path that is no subagent's is dropped, and sizes are bounded. `load` always says that there is nothing: for a resume
the server writes the files itself, as the session's user (the SDK's own way fails under another one).

What waits is in memory only. The copy on disk is the CLI's own transcript; a spool beside it would be lost with it.
"""

import asyncio
import contextlib
import json
import os
import re
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any

import structlog
from claude_agent_sdk.types import SessionKey, SessionStoreEntry

from hypercore_agents.agent.gateway.client import Gateway, StalePlacement
from hypercore_agents.agent.isolation.backends import Isolation
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.agent.persistence.journal import gap
from hypercore_agents.api.chat import Usage
from hypercore_agents.api.errors import HypercoreError, InvalidRequest, NotFound, PayloadTooLarge
from hypercore_agents.api.internal import (
    SUBPATH_PATTERN,
    TRANSCRIPT_LINE_LIMIT,
    EventEntry,
    Transcript,
    TranscriptEntry,
)
from hypercore_agents.kit.aio.tasks import Tasks

_log = structlog.get_logger(__name__)
_BATCH_ENTRIES, _BATCH_CHARACTERS = 500, 2_000_000
_EARLY_LIMIT = 100
WAITING_LIMIT = 64 * 1024 * 1024
"""Characters that may wait for the gateway; what comes beyond is not mirrored, and the session says so."""
EVENTS_LIMIT = 8_000_000
"""Characters of events that may wait; what is older is cut, as it would be in the store."""
LINGER_SECONDS = 0.25
"""How long entries and events wait for more of their turn, so that a short turn costs one request: its end sends them
at once."""
_FIRST_PAUSE, _LAST_PAUSE = 0.2, 10.0
_SUBPATH = re.compile(SUBPATH_PATTERN)


class TranscriptMirror:
    """One session's mirror on this agent. `on_stale` is called when the session was found to have moved on, `on_lost`
    when an entry will never be kept."""

    def __init__(
        self,
        session_id: str,
        generation: int,
        gateway: Gateway,
        tasks: Tasks,
        *,
        on_stale: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        self.lost = False
        self.full = False
        """The store takes no more of this session: what came before is kept, the rest is not."""
        self.end_kept = False
        """Whether the store took the end that `conclude` was given last."""
        self.generation = generation
        self._session_id = session_id
        self._gateway = gateway
        self._tasks = tasks
        self._on_stale = on_stale
        self._on_lost = on_lost
        self._waiting: deque[TranscriptEntry] = deque()
        self._waiting_characters = 0
        self._events: deque[EventEntry] = deque()
        self._events_characters = 0
        self._apart = self._stopped = False
        self._sender: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._again = asyncio.Event()
        self._turn: int | None = None
        self._end: EventEntry | None = None
        self._usage: Usage | None = None
        self._settled = asyncio.Event()
        self._settled.set()

    async def append(self, key: SessionKey, entries: list[SessionStoreEntry]) -> None:
        """Queue entries; returns at once."""
        subpath = str(key.get("subpath") or "")
        if _SUBPATH.fullmatch(subpath) is None:
            _log.warning("transcript.foreign_path", session_id=self._session_id)
            return
        for entry in entries:
            if isinstance(entry, dict):
                self._queue(subpath, dict(entry))
        if self._waiting:
            self._start()

    def tell(self, event: EventEntry, soon: bool) -> None:
        """Queue an event for the session's log; `soon`: send it without waiting for more."""
        self._events.append(event)
        self._events_characters += len(event.data)
        while self._events_characters > EVENTS_LIMIT and len(self._events) > 2:
            first, lost = self._events.popleft(), self._events.popleft()
            self._events.appendleft(gap(lost))
            self._events_characters += len(self._events[0].data) - len(first.data) - len(lost.data)
        self._start()
        if soon:
            self._hurry.set()

    def _start(self) -> None:
        if self._sender is None and not self._stopped:
            self._hurry.clear()
            self._settled.clear()
            with contextlib.suppress(RuntimeError):  # the server ends: what waits is lost with it
                self._sender = self._tasks.start("mirror", self._send())

    @property
    def kept(self) -> bool:
        """Whether all that was appended is in the store now."""
        return self._settled.is_set() and not self.lost

    async def settled(self, seconds: float) -> bool:
        """Wait until all that was appended is in the store, at most so long; say whether it is."""
        self._hurry.set()
        self._again.set()  # somebody waits: no pause after a failure
        try:
            async with asyncio.timeout(seconds):
                await self._settled.wait()
        except TimeoutError:
            return False
        return not self.lost

    async def conclude(self, turn: int, seconds: float, *, end: EventEntry | None = None) -> tuple[bool, Usage | None]:
        """As `settled`, at a turn's end; with it what the turn cost, if that came with the store's answer.

        `end` is the turn's last event, which says that all is kept: it is sent with the last of it, or not at all.
        """
        self._turn, self._usage, self.end_kept = turn, None, False
        if end is not None and not self.lost:
            self._end = end
            self.tell(end, soon=True)
        try:
            return await self.settled(seconds), self._usage
        finally:
            self._turn = None
            self._drop_end()

    def _drop_end(self) -> bool:
        """Send the turn's end no more, unless that is done; say whether it waited."""
        end, self._end = self._end, None
        if end is None or end not in self._events:
            return False
        self._events.remove(end)
        self._events_characters -= len(end.data)
        return True

    def stop(self) -> None:
        """Send no more: the session is gone from here."""
        self._stopped = True
        if self._sender is not None:
            self._sender.cancel()

    def _queue(self, subpath: str, entry: dict[str, Any]) -> None:
        if "sessionId" in entry:
            entry["sessionId"] = self._session_id
        line = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
        if self.full:
            return
        if len(line) > TRANSCRIPT_LINE_LIMIT or self._waiting_characters + len(line) > WAITING_LIMIT:
            self.lost = True
            self._on_lost()
            _log.warning("transcript.too_much", session_id=self._session_id, characters=len(line))
            return
        name = entry.get("uuid")
        name = name.replace("\0", "") if isinstance(name, str) else ""  # no store takes a null character
        if not 1 <= len(name) <= 64:
            name = str(uuid.uuid4())
        self._waiting.append(TranscriptEntry(subpath=subpath, uuid=name, line=line))
        self._waiting_characters += len(line)

    async def _send(self) -> None:
        pause = _FIRST_PAUSE
        try:
            while self._waiting or self._events:
                await self._linger()
                batch = self._batch()
                events = [] if batch and self._apart else self._event_batch()
                if len(batch) < len(self._waiting) and events and events[-1] is self._end:
                    events.pop()  # it says that all is kept
                last = (len(batch), len(events)) == (len(self._waiting), len(self._events))
                try:
                    usage = await self._gateway.append_transcript(
                        self._session_id, self.generation, batch, events, turn=self._turn if last else None
                    )
                except (StalePlacement, NotFound):
                    self.lost = True
                    self._waiting.clear()
                    self._events.clear()
                    self._on_stale()
                    return
                except PayloadTooLarge:
                    # What comes after a gap would be of no use, so the transcript ends here; events go on.
                    self._drop_end()
                    self._on_lost()
                    if not batch:
                        self._refused(batch, events)
                        self._forget(batch, events)
                    self.lost = self.full = True
                    self._waiting.clear()
                    self._waiting_characters = 0
                    _log.error("transcript.full", session_id=self._session_id)
                    continue
                except InvalidRequest as error:
                    if self._drop_end():
                        continue  # it may be to blame, and its id is still needed
                    if batch and events:
                        self._apart = True  # one of both is to blame
                        continue
                    self._on_lost()
                    self._refused(batch, events)
                    _log.error("transcript.refused", session_id=self._session_id, error=error.message)
                except HypercoreError:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(pause):
                            await self._again.wait()
                    self._again.clear()
                    pause = min(2 * pause, _LAST_PAUSE)
                    continue
                else:
                    self._usage = usage
                    self.end_kept = self._end is not None and bool(events) and events[-1] is self._end
                pause = _FIRST_PAUSE
                self._forget(batch, events)
        finally:
            self._sender = None
            if not self._waiting and not self._events:
                self._settled.set()

    async def _linger(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await self._hurry.wait()

    def _refused(self, batch: list[TranscriptEntry], events: list[EventEntry]) -> None:
        if batch:
            self.lost = True
        elif len(events) > 1 or events[0].name != "reset":
            mark = gap(events[-1])
            self._events.insert(len(events), mark)
            self._events_characters += len(mark.data)

    def _forget(self, batch: list[TranscriptEntry], events: list[EventEntry]) -> None:
        for entry in batch:
            self._waiting.popleft()
            self._waiting_characters -= len(entry.line)
        for event in events:  # those that are still there: some may have been cut meanwhile
            if self._events and self._events[0] is event:
                self._events.popleft()
                self._events_characters -= len(event.data)

    def _event_batch(self) -> list[EventEntry]:
        batch: list[EventEntry] = []
        characters = 0
        for event in self._events:
            if batch and (len(batch) == _BATCH_ENTRIES or characters + len(event.data) > _BATCH_CHARACTERS):
                break
            batch.append(event)
            characters += len(event.data)
        return batch

    def _batch(self) -> list[TranscriptEntry]:
        batch: list[TranscriptEntry] = []
        characters = 0
        for entry in self._waiting:
            if batch and (len(batch) == _BATCH_ENTRIES or characters + len(entry.line) > _BATCH_CHARACTERS):
                break
            batch.append(entry)
            characters += len(entry.line)
        return batch


class TranscriptPort:
    """The session store of one CLI, which may be started before it is anybody's: passes on to a mirror, once given."""

    def __init__(self, mirror: TranscriptMirror | None = None) -> None:
        self._mirror = mirror
        self._passed = False
        self._early: list[tuple[SessionKey, list[SessionStoreEntry]]] = []

    async def give(self, mirror: TranscriptMirror) -> None:
        """Pass on to this mirror from now on, and what came before."""
        self._mirror = mirror
        early, self._early = self._early, []
        for key, entries in early:
            await mirror.append(key, entries)

    def withdraw(self) -> bool:
        """Pass nothing on any more; return whether nothing ever was, so that the CLI can still be anybody's."""
        self._mirror = None
        return not self._passed

    async def append(self, key: SessionKey, entries: list[SessionStoreEntry]) -> None:
        """Pass entries on."""
        self._passed = True
        if self._mirror is not None:
            await self._mirror.append(key, entries)
        elif len(self._early) < _EARLY_LIMIT:
            self._early.append((key, entries))

    async def load(self, key: SessionKey) -> list[SessionStoreEntry] | None:
        """Say that nothing is known: what there is, the server has written where the CLI finds it."""
        return None


async def restore(transcript: Transcript, folder: SessionFolder, isolation: Isolation) -> int:
    """Write a transcript where the CLI looks for it, as the session's user; return how many entries were left out.

    A transcript is repaired up to its last whole entry: what comes after a broken one is left out. Raises OSError.
    """
    files: dict[str, list[str]] = {}
    broken: dict[str, int] = {}
    for entry in transcript.entries:
        if entry.subpath in broken or not _is_object(entry.line):
            broken[entry.subpath] = broken.get(entry.subpath, 0) + 1
        else:
            files.setdefault(entry.subpath, []).append(entry.line)
    main = folder.root / folder.transcript
    for subpath, lines in files.items():
        target = main.with_suffix("") / f"{subpath}.jsonl" if subpath else main
        await _write(isolation, folder, str(target), "".join(f"{line}\n" for line in lines).encode())
    return sum(broken.values())


async def _write(isolation: Isolation, folder: SessionFolder, path: str, content: bytes) -> None:
    source = os.memfd_create("transcript", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(source), "wb") as file:
            file.write(content)
        os.lseek(source, 0, os.SEEK_SET)
        script = 'umask 077 && mkdir -p "$(dirname "$1")" && cat >"$1"'
        status = await isolation.run_as(folder, ["sh", "-c", script, "sh", path], stdin=source)
    finally:
        os.close(source)
    if status != 0:
        raise OSError(f"a transcript could not be written (status {status})")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
