"""The mirror of a session: sends its transcript and events to the gateway while the Claude CLI writes them.

`append` and `append_event` only queue, so neither the CLI nor a turn waits for the network. One task per session sends
the queue in order and retries until the gateway accepts it. Entries and events share requests; during a turn, the task
waits briefly for more. An entry is identified by its uuid, so one that is sent twice is stored once.

Everything from the CLI may be forged by a tool: the server's own session id replaces the one in an entry, entries with
a path that is not a subagent's are dropped, and sizes are bounded.

The queue is in memory only. The copy on disk is the CLI's own transcript; a spool beside it would be lost with it.
"""

import asyncio
import contextlib
import json
import re
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any

import structlog
from claude_agent_sdk.types import SessionKey, SessionStoreEntry

from hypercore_agents.agent.gateway.client import GatewayClient, StalePlacement
from hypercore_agents.agent.persistence.journal import gap
from hypercore_agents.api.chat import Usage
from hypercore_agents.api.errors import HypercoreError, InvalidRequest, NotFound, PayloadTooLarge
from hypercore_agents.api.internal import SUBPATH_PATTERN, TRANSCRIPT_LINE_LIMIT, EventEntry, TranscriptEntry
from hypercore_agents.kit.aio.tasks import Tasks

_log = structlog.get_logger(__name__)
_BATCH_ENTRIES, _BATCH_CHARACTERS = 500, 2_000_000
QUEUE_LIMIT = 64 * 1024 * 1024
"""Characters of entries in the queue; further entries are not mirrored, and the session's answers say so."""
EVENTS_LIMIT = 8_000_000
"""Characters of events in the queue; the oldest are replaced by a `reset`, as they would be in the store."""
LINGER_SECONDS = 0.25
"""How long the task waits for more entries of a turn before it sends, so that a short turn costs one request. A turn's
end sends at once."""
_FIRST_PAUSE, _LAST_PAUSE = 0.2, 10.0
_SUBPATH = re.compile(SUBPATH_PATTERN)


class TranscriptMirror:
    """One session's mirror on this agent.

    `on_stale` is called when the gateway reports a newer placement of the session, `on_lost` when an entry will never
    be stored.
    """

    def __init__(
        self,
        session_id: str,
        generation: int,
        gateway: GatewayClient,
        tasks: Tasks,
        *,
        on_stale: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        self.lost = False
        """Whether an entry will never be stored."""
        self.full = False
        """Whether the store accepts no more of this transcript: the beginning is stored, the rest is not."""
        self.end_stored = False
        """Whether the store accepted the last event that was passed to `conclude`."""
        self.generation = generation
        self._session_id = session_id
        self._gateway = gateway
        self._tasks = tasks
        self._on_stale = on_stale
        self._on_lost = on_lost
        self._entries: deque[TranscriptEntry] = deque()
        self._entries_characters = 0
        self._events: deque[EventEntry] = deque()
        self._events_characters = 0
        self._send_separately = False
        """Whether entries and events are sent in separate requests, since the gateway rejected a request with both."""
        self._stopped = False
        self._sender: asyncio.Task[None] | None = None
        self._send_now = asyncio.Event()
        self._retry_now = asyncio.Event()
        self._turn: int | None = None
        self._end: EventEntry | None = None
        self._usage: Usage | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    async def append(self, key: SessionKey, entries: list[SessionStoreEntry]) -> None:
        """Queue transcript entries; returns at once."""
        subpath = str(key.get("subpath") or "")
        if _SUBPATH.fullmatch(subpath) is None:
            _log.warning("transcript.foreign_path", session_id=self._session_id)
            return
        for entry in entries:
            if isinstance(entry, dict):
                self._queue(subpath, dict(entry))
        if self._entries:
            self._start()

    def append_event(self, event: EventEntry, soon: bool) -> None:
        """Queue an event for the session's log; `soon`: send it without waiting for more."""
        self._events.append(event)
        self._events_characters += len(event.data)
        while self._events_characters > EVENTS_LIMIT and len(self._events) > 2:
            first, lost = self._events.popleft(), self._events.popleft()
            self._events.appendleft(gap(lost))
            self._events_characters += len(self._events[0].data) - len(first.data) - len(lost.data)
        self._start()
        if soon:
            self._send_now.set()

    @property
    def is_stored(self) -> bool:
        """Whether the store has everything that was appended."""
        return self._idle.is_set() and not self.lost

    async def wait_until_stored(self, seconds: float) -> bool:
        """Wait at most `seconds` until the store has everything that was appended; return whether it has."""
        self._send_now.set()
        self._retry_now.set()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return not self.lost

    async def conclude(self, turn: int, seconds: float, *, end: EventEntry | None = None) -> tuple[bool, Usage | None]:
        """Do as `wait_until_stored` at a turn's end; also return the turn's usage if the store's answer contained it.

        `end` is the turn's last event, which states that everything is stored. It is sent with the last entry or not at
        all.
        """
        self._turn, self._usage, self.end_stored = turn, None, False
        if end is not None and not self.lost:
            self._end = end
            self.append_event(end, soon=True)
        try:
            return await self.wait_until_stored(seconds), self._usage
        finally:
            self._turn = None
            self._withdraw_end()

    def stop(self) -> None:
        """Send no more: the session has left this agent."""
        self._stopped = True
        if self._sender is not None:
            self._sender.cancel()

    def _start(self) -> None:
        if self._sender is None and not self._stopped:
            self._send_now.clear()
            self._idle.clear()
            with contextlib.suppress(RuntimeError):  # the server ends, and the queue is lost with it
                self._sender = self._tasks.start("mirror", self._send())

    def _withdraw_end(self) -> bool:
        """Take the turn's end out of the queue, unless it was sent; return whether it was in the queue."""
        end, self._end = self._end, None
        if end is None or end not in self._events:
            return False
        self._events.remove(end)
        self._events_characters -= len(end.data)
        return True

    def _queue(self, subpath: str, entry: dict[str, Any]) -> None:
        if "sessionId" in entry:
            entry["sessionId"] = self._session_id
        line = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
        if self.full:
            return
        if len(line) > TRANSCRIPT_LINE_LIMIT or self._entries_characters + len(line) > QUEUE_LIMIT:
            self.lost = True
            self._on_lost()
            _log.warning("transcript.too_much", session_id=self._session_id, characters=len(line))
            return
        name = entry.get("uuid")
        name = name.replace("\0", "") if isinstance(name, str) else ""  # databases reject a null character
        if not 1 <= len(name) <= 64:
            name = str(uuid.uuid4())
        self._entries.append(TranscriptEntry(subpath=subpath, uuid=name, line=line))
        self._entries_characters += len(line)

    async def _send(self) -> None:
        pause = _FIRST_PAUSE
        try:
            while self._entries or self._events:
                await self._linger()
                entries = self._entry_batch()
                events = [] if entries and self._send_separately else self._event_batch()
                if len(entries) < len(self._entries) and events and events[-1] is self._end:
                    events.pop()  # it states that everything is stored
                is_last = (len(entries), len(events)) == (len(self._entries), len(self._events))
                try:
                    usage = await self._gateway.append_transcript(
                        self._session_id, self.generation, entries, events, turn=self._turn if is_last else None
                    )
                except (StalePlacement, NotFound):
                    self.lost = True
                    self._entries.clear()
                    self._events.clear()
                    self._on_stale()
                    return
                except PayloadTooLarge:
                    # Entries after a gap would be useless, so the transcript ends here; events continue.
                    self._withdraw_end()
                    self._on_lost()
                    if not entries:
                        self._note_refused(entries, events)
                        self._remove_sent(entries, events)
                    self.lost = self.full = True
                    self._entries.clear()
                    self._entries_characters = 0
                    _log.error("transcript.full", session_id=self._session_id)
                    continue
                except InvalidRequest as error:
                    if self._withdraw_end():
                        continue  # the end may be the cause, and its id is still needed
                    if entries and events:
                        self._send_separately = True  # one of both is the cause
                        continue
                    self._on_lost()
                    self._note_refused(entries, events)
                    _log.error("transcript.refused", session_id=self._session_id, error=error.message)
                except HypercoreError:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(pause):
                            await self._retry_now.wait()
                    self._retry_now.clear()
                    pause = min(2 * pause, _LAST_PAUSE)
                    continue
                else:
                    self._usage = usage
                    self.end_stored = self._end is not None and bool(events) and events[-1] is self._end
                pause = _FIRST_PAUSE
                self._remove_sent(entries, events)
        finally:
            self._sender = None
            if not self._entries and not self._events:
                self._idle.set()

    async def _linger(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await self._send_now.wait()

    def _note_refused(self, entries: list[TranscriptEntry], events: list[EventEntry]) -> None:
        if entries:
            self.lost = True
        elif len(events) > 1 or events[0].name != "reset":
            mark = gap(events[-1])
            self._events.insert(len(events), mark)
            self._events_characters += len(mark.data)

    def _remove_sent(self, entries: list[TranscriptEntry], events: list[EventEntry]) -> None:
        for entry in entries:
            self._entries.popleft()
            self._entries_characters -= len(entry.line)
        for event in events:  # only those that are still queued: some may have been replaced meanwhile
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

    def _entry_batch(self) -> list[TranscriptEntry]:
        batch: list[TranscriptEntry] = []
        characters = 0
        for entry in self._entries:
            if batch and (len(batch) == _BATCH_ENTRIES or characters + len(entry.line) > _BATCH_CHARACTERS):
                break
            batch.append(entry)
            characters += len(entry.line)
        return batch
