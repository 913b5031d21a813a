"""A session's events against a model: turns, a store that is down, parking, kills and resumes in any order.

The agent's part (`Journal`) and the manager's part (`EventStreams`) are the real ones, on a real store; calls replace
the HTTP between them. Event ids must always increase. A reader that reconnects to its stream again and again must see
every event of the log once, in order, and the complete text of every turn.
"""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import update

from hypercore_agents.agent.persistence.journal import Journal
from hypercore_agents.api.chat import ChatResponse, Usage
from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.api.events import (
    Delta,
    EventData,
    EventId,
    Reset,
    SessionStarted,
    TextBlock,
    ToolUse,
    decode,
    parse_id,
)
from hypercore_agents.api.ids import new_session_id
from hypercore_agents.api.internal import EventEntry, EventMark, TranscriptAppend
from hypercore_agents.gateway.session_archives import Archives
from hypercore_agents.manager.change_signals import ChangeSignals
from hypercore_agents.manager.sessions.access import SessionAccess
from hypercore_agents.manager.sessions.follow import EventStreams
from hypercore_agents.store import agents, events, placement
from hypercore_agents.store.blobs import Blobs
from hypercore_agents.store.database import Database, sqlite_url
from hypercore_agents.store.schema import migrate
from hypercore_agents.store.tables import sessions as session_rows
from support.store_rows import AGENT

T = TypeVar("T")


class Agent:
    """The agent's part of the session. `queued` is not in the store yet."""

    def __init__(self, generation: int, mark: EventMark | None) -> None:
        self.queued: list[EventEntry] = []
        self.journal = Journal(generation, lambda entry, _: self.queued.append(entry))
        self.journal.continue_after(mark)


class Ring:
    """An agent's stream, as a manager reads it."""

    def __init__(self, agent: Agent, last: EventId | None) -> None:
        self._following = agent.journal.ring.follow(last, keepalive_seconds=0.01)

    async def next_chunk(self) -> bytes:
        async for frames in self._following:
            return frames or b": quiet\n\n"
        return b""

    def close(self) -> None:
        pass


class Streams(EventStreams):
    """Reads from the current agent."""

    agent: Agent | None = None

    async def _open(self, row: Any, last: EventId | None, *, complete: bool) -> Any:
        if self.agent is None or (complete and not self.agent.journal.ring.holds(last)):
            return None
        return Ring(self.agent, last)


class Reader:
    """A client: the events that it saw, and the text of the turn so far."""

    def __init__(self) -> None:
        self.last: str | None = None
        self.seen: list[EventId] = []
        self.text = ""
        self.turn_is_running = False
        self.answers: list[tuple[str, str]] = []

    def feed(self, frames: bytes) -> bool:
        """Read complete frames; return False when they are only a comment."""
        has_event = False
        for frame in frames.split(b"\n\n"):
            fields = dict(line.split(b": ", 1) for line in frame.split(b"\n") if line and not line.startswith(b":"))
            if not fields:
                continue
            has_event = True
            shown = fields.get(b"id", b"").decode()
            self.last = shown or self.last
            data = decode(fields[b"event"].decode(), fields[b"data"])
            assert data is not None
            self._take(data, parse_id(shown))
        return has_event

    def _take(self, data: EventData, event_id: EventId | None) -> None:
        if isinstance(data, Delta | TextBlock):
            self.text += data.text
            return
        if isinstance(data, Reset | SessionStarted | ToolUse):
            self.text = ""
        if isinstance(data, ChatResponse):
            self.answers.append((self.text, data.content))
        if event_id is not None and not isinstance(data, Reset):
            self.seen.append(event_id)


class Log(RuleBasedStateMachine):
    """One session, one reader."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.database = Database(sqlite_url(Path(self.folder.name) / "store.db"))
        blobs = Blobs(None, Path(self.folder.name) / "blobs")
        self.archives = Archives(self.database, blobs, workspace_bytes=1000, transcript_bytes=10**6)
        unused: Any = None
        self.streams = Streams(
            database=self.database, directory=unused, upstream=unused, changes=ChangeSignals(), clock=lambda: 10.0
        )
        self.session_id = new_session_id()
        self.generation = 1
        self.agent: Agent | None = None
        self.reader = Reader()
        self.issued: list[EventId] = []
        self.turns = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @initialize()
    def begin(self) -> None:
        async def place() -> None:
            await migrate(self.database)
            async with self.database.write() as connection:
                await agents.insert_agent(connection, replace(AGENT, capacity=5))
                placed = await placement.place_new(
                    connection, session_id=self.session_id, user_id="ada", options={}, now=1.0
                )
                assert placed == AGENT.agent_id

        self.run(place())
        self.arrive()

    def teardown(self) -> None:
        self.run(self.database.close())
        self.runner.close()
        self.folder.cleanup()

    def arrive(self) -> None:
        async def mark() -> EventMark | None:
            async with self.database.read() as connection:
                last = await events.newest(connection, self.session_id)
            if last is None:
                return None
            name: Any = last.name
            return EventMark(generation=last.event_id[0], sequence=last.event_id[1], name=name)

        self.agent = self.streams.agent = Agent(self.generation, self.run(mark()))

    def publish(self, event: EventData) -> None:
        assert self.agent is not None
        shown, _ = self.agent.journal.publish(event)
        event_id = parse_id(shown)
        assert event_id is not None
        assert not self.issued or event_id > self.issued[-1], "ids increase"
        self.issued.append(event_id)

    @rule(
        steps=st.lists(st.sampled_from(("delta", "delta", "delta", "tool", "cut", "store", "read")), max_size=8),
        end=st.sampled_from(("stays", "released", "lost", "lost after")),
    )
    def turn(self, steps: list[str], end: str) -> None:
        """A turn, on any agent; then the session stays, is released, or its agent is lost."""
        if self.agent is None:
            self.arrive()
        assert self.agent is not None
        self.turns += 1
        self.agent.journal.begin_turn()
        self.issued.extend(e for e in [self.newest()] if not self.issued or e > self.issued[-1])
        content = ""
        self.publish(SessionStarted(session_id=self.session_id, agent_id="a", turn=self.turns, tools=True, notices=[]))
        for number, kind in enumerate(steps):
            if kind == "delta":
                content += f"{self.turns}.{number} "
                self.publish(Delta(text=f"{self.turns}.{number} "))
            elif kind == "tool":
                content = ""
                self.publish(ToolUse(tool_use_id="t", name="Bash", input={}))
            elif kind == "cut":
                content = ""
                self.publish(Reset(reason="cut"))
            elif kind == "store":
                self.send_to_store()
            else:
                self.run(self._read(1))
        if end == "lost":
            self.kill()
            return
        self.agent.journal.flush()
        self.publish(
            ChatResponse(
                session_id=self.session_id, agent_id="a", content=content, usage=Usage(), status="completed",
                turn=self.turns, tools=True,
            )
        )  # fmt: skip
        if end == "released":
            self.release()
        elif end == "lost after":
            self.kill()

    def newest(self) -> EventId:
        assert self.agent is not None
        return self.agent.journal.generation, self.agent.journal._sequence

    def send_to_store(self) -> None:
        assert self.agent is not None
        queued, self.agent.queued = self.agent.queued, []
        if queued:
            body = TranscriptAppend(generation=self.generation, events=queued)
            self.run(self.archives.append(AGENT.agent_id, self.session_id, body))
            self.run(self.archives.append(AGENT.agent_id, self.session_id, body))  # sent twice, stored once

    def release(self) -> None:
        """Release the idle session once everything is stored; it may come back under the same generation."""
        self.send_to_store()
        self.agent = self.streams.agent = None

    def kill(self) -> None:
        """Lose the agent and its unsent events; the session is placed again."""
        unsent = self.agent.queued if self.agent else []
        self.agent = self.streams.agent = None
        self.generation += 1

        async def move() -> bool:
            async with self.database.write() as connection:
                await connection.execute(update(session_rows).values(generation=self.generation))
            try:
                body = TranscriptAppend(generation=self.generation - 1, events=unsent)
                await self.archives.append(AGENT.agent_id, self.session_id, body)
            except HypercoreError:
                return True
            return False

        assert self.run(move()), "an agent that was declared lost can no longer write"

    @rule(most=st.integers(1, 6))
    def read_some(self, most: int) -> None:
        """The reader reconnects, and disconnects after some frames, or when none come."""
        self.run(self._read(most))

    async def _read(self, most: int) -> None:
        stream: AsyncGenerator[bytes, None] = self.streams.follow(
            self.session_id, SessionAccess(), parse_id(self.reader.last)
        )
        async with contextlib.aclosing(stream):
            with contextlib.suppress(TimeoutError):
                while most:
                    async with asyncio.timeout(0.05):
                        if not self.reader.feed(await anext(stream)):
                            return
                    most -= 1

    @invariant()
    def no_event_comes_twice(self) -> None:
        assert self.reader.seen == sorted(set(self.reader.seen))
        for text, content in self.reader.answers:
            assert text == content

    @rule()
    def read_all(self) -> None:
        async def stored() -> list[EventId]:
            async with self.database.read() as connection:
                page = await events.page(connection, self.session_id, None, limit=5000)
            return [row.event_id for row in page.rows if row.name not in ("text", "reset")]

        deadline = time.monotonic() + 5
        while missing := [event_id for event_id in self.run(stored()) if event_id not in self.reader.seen]:
            assert time.monotonic() < deadline, missing
            self.run(self._read(1000))


Log.TestCase.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLog = Log.TestCase
