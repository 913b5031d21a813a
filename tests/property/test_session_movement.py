"""Where sessions live and what is kept of them, against a model: open, turn, idle, drain, loss, delete in any order.

On a real store, with the statements of manager and gateway; no processes, so that hundreds of steps are quick.
"""

import asyncio
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hypercore_agents.api.agents import AgentState
from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.api.ids import new_session_id
from hypercore_agents.api.internal import TranscriptAppend, TranscriptEntry
from hypercore_agents.gateway.archives import Archives
from hypercore_agents.store import agents, sessions, transcripts
from hypercore_agents.store.blobs import Blobs
from hypercore_agents.store.database import Database, sqlite_url
from hypercore_agents.store.schema import migrate
from integration.test_store import AGENT

T = TypeVar("T")
CAPACITY = 2


@dataclass
class Known:
    """What the model knows of a session. `places`: every agent and generation that it ever had."""

    agent_id: str | None
    generation: int = 1
    turns: int = 0
    ended: bool = False
    lines: list[str] = field(default_factory=list)
    places: list[tuple[str, int]] = field(default_factory=list)


class Movement(RuleBasedStateMachine):
    """Compares after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.database = Database(sqlite_url(Path(self.folder.name) / "store.db"))
        blobs = Blobs(None, Path(self.folder.name) / "blobs")
        self.archives = Archives(self.database, blobs, workspace_bytes=1000, transcript_bytes=2**20)
        self.agents: dict[str, AgentState] = {}
        self.sessions: dict[str, Known] = {}
        self.now = 10.0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @initialize()
    def begin(self) -> None:
        self.run(migrate(self.database))
        self.add_agent()

    def teardown(self) -> None:
        self.run(self.database.close())
        self.runner.close()
        self.folder.cleanup()

    @precondition(lambda self: len(self.agents) < 5)
    @rule()
    def add_agent(self) -> None:
        row = replace(AGENT, agent_id=f"agent-{len(self.agents):016x}", capacity=CAPACITY)

        async def insert() -> None:
            async with self.database.write() as connection:
                await agents.insert_agent(connection, row)

        self.run(insert())
        self.agents[row.agent_id] = AgentState.RUNNING

    @rule()
    def open(self) -> None:
        session_id = new_session_id()

        async def place() -> str | None:
            async with self.database.write(exclusive=sessions.PLACEMENT) as connection:
                return await sessions.place_new(
                    connection, session_id=session_id, user_id="ada", options={}, now=self.now
                )

        agent_id = self.run(place())
        assert (agent_id is None) == (not self._room())
        if agent_id is not None:
            assert self._load(agent_id) < CAPACITY
            self.sessions[session_id] = Known(agent_id, places=[(agent_id, 1)])

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), lines=st.integers(1, 3))
    def turn(self, data: st.DataObject, lines: int) -> None:
        """A turn moves a session that has no running agent, keeps what is written, and ends."""
        session_id, known = self._pick(data)
        lost = known.agent_id is None or self.agents[known.agent_id] is not AgentState.RUNNING

        async def go() -> sessions.SessionRow | None:
            async with self.database.write(exclusive=sessions.PLACEMENT) as connection:
                await sessions.place_again(connection, session_id, now=self.now)
            async with self.database.write() as connection:
                row = await sessions.begin_turn(
                    connection, session_id, holder="m", max_tokens=None, temperature=None, now=self.now
                )
                if row is not None:
                    await sessions.end_turn(connection, session_id, row.turn, now=self.now)
                return row

        could = not known.ended and (not lost or self._room())
        row = self.run(go())
        assert (row is not None) == could
        if row is None:
            return
        assert row.agent_id is not None
        if lost:
            assert self.agents[row.agent_id] is AgentState.RUNNING
            assert row.generation == known.generation + 1
            known.places.append((row.agent_id, row.generation))
        known.agent_id, known.generation, known.turns = row.agent_id, row.generation, known.turns + 1
        assert row.turn == known.turns
        said = [f"{known.turns}.{number}" for number in range(lines)]
        assert self._append(session_id, known.agent_id, known.generation, said)
        assert self._append(session_id, known.agent_id, known.generation, said), "sent twice, kept once"
        known.lines += said

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def an_old_agent_comes_back(self, data: st.DataObject) -> None:
        """Whoever had the session once writes as if it still had."""
        session_id, known = self._pick(data)
        agent_id, generation = data.draw(st.sampled_from(known.places))
        alive = self.agents[agent_id] in agents.LIVE_STATES
        current = not known.ended and alive and (agent_id, generation) == (known.agent_id, known.generation)
        line = f"late.{generation}.{self.now}"
        assert self._append(session_id, agent_id, generation, [line]) == current
        if current and line not in known.lines:
            known.lines.append(line)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def idle(self, data: st.DataObject) -> None:
        session_id, known = self._pick(data)
        self.now += 1

        async def unplace() -> bool:
            async with self.database.write() as connection:
                return await sessions.unplace_idle(
                    connection, session_id, known.generation, before=self.now, now=self.now
                )

        assert self.run(unplace()) == (not known.ended and known.agent_id is not None)
        if not known.ended:
            known.agent_id = None

    @rule(data=st.data(), after=st.sampled_from((AgentState.DRAINING, AgentState.FAILED)))
    def an_agent_drains_or_is_lost(self, data: st.DataObject, after: AgentState) -> None:
        agent_id = data.draw(st.sampled_from(sorted(self.agents)))
        if self.agents[agent_id] is AgentState.FAILED or self.agents[agent_id] is after:
            return

        async def change() -> None:
            async with self.database.write() as connection:
                row = await agents.get_agent(connection, agent_id)
                assert row is not None
                assert await agents.change_agent(connection, agent_id, row.version, now=self.now, state=after)
                if after is AgentState.FAILED:
                    await sessions.unplace_sessions_of(connection, agent_id)

        self.run(change())
        self.agents[agent_id] = after
        if after is AgentState.FAILED:
            for known in self.sessions.values():
                if known.agent_id == agent_id and not known.ended:
                    known.agent_id = None

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        session_id, known = self._pick(data)

        async def end() -> bool:
            async with self.database.write() as connection:
                await transcripts.forget(connection, session_id)
                return await sessions.end_session(connection, session_id, now=self.now)

        assert self.run(end()) == (not known.ended)
        known.ended, known.lines = True, []

    @invariant()
    def everything_kept_is_there_and_no_agent_has_too_many(self) -> None:
        async def look() -> None:
            async with self.database.read() as connection:
                for session_id, known in self.sessions.items():
                    kept = [entry.uuid for entry in (await transcripts.load(connection, session_id)).entries]
                    assert kept == known.lines
                    row = await sessions.get_session(connection, session_id)
                    assert row is not None
                    assert (row.state == sessions.ENDED) == known.ended
                    if not known.ended:
                        assert (row.agent_id, row.generation) == (known.agent_id, known.generation)

        if self.agents:
            self.run(look())
        assert all(self._load(agent_id) <= CAPACITY for agent_id in self.agents)

    def _append(self, session_id: str, agent_id: str, generation: int, lines: list[str]) -> bool:
        entries = [TranscriptEntry(uuid=line, line="{}") for line in lines]
        try:
            self.run(
                self.archives.append(agent_id, session_id, TranscriptAppend(generation=generation, entries=entries))
            )
        except HypercoreError:
            return False
        return True

    def _pick(self, data: st.DataObject) -> tuple[str, Known]:
        session_id = list(self.sessions)[data.draw(st.integers(0, len(self.sessions) - 1))]
        return session_id, self.sessions[session_id]

    def _load(self, agent_id: str) -> int:
        return sum(1 for known in self.sessions.values() if known.agent_id == agent_id and not known.ended)

    def _room(self) -> bool:
        return any(
            state is AgentState.RUNNING and self._load(agent_id) < CAPACITY for agent_id, state in self.agents.items()
        )


Movement.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMovement = Movement.TestCase
