"""Placement and storage of sessions, against a model: open, turn, park, resume, kill, drain, delete, unplace.

The store and the statements of manager and gateway are real. There are no processes, so hundreds of steps are quick.
Agents are simulated: each holds in memory its live sessions and the entries that it could not send yet (those turns
were not acknowledged as durable). A turn of a session that is not live resumes it from the store.

Planted defects in the real statements show what the machine finds: a walk by its rules must then fail.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from hypercore_agents.api.agents import AgentState
from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.api.ids import new_session_id
from hypercore_agents.api.internal import TranscriptAppend, TranscriptEntry
from hypercore_agents.gateway.internal import require_append_state, require_placed
from hypercore_agents.gateway.session_archives import Archives
from hypercore_agents.store import agents, placement, session_lifecycle, sessions, transcripts, turns
from hypercore_agents.store.blobs import Blobs
from hypercore_agents.store.database import Connection, Database, sqlite_url
from hypercore_agents.store.schema import migrate
from support.store_rows import AGENT

T = TypeVar("T")
CAPACITY = 2


@dataclass
class ModelSession:
    """The model of a session. `places`: every agent and generation that it ever had."""

    agent_id: str | None
    generation: int = 1
    turns: int = 0
    ended: bool = False
    lines: list[str] = field(default_factory=list)
    workspace: bytes | None = None
    places: list[tuple[str, int]] = field(default_factory=list)


@dataclass
class LiveSession:
    """A session in an agent's memory: its history, and the part of it that the store does not have yet."""

    generation: int
    lines: list[str]
    workspace: bytes | None
    unsent: list[str] = field(default_factory=list)


class Movement(RuleBasedStateMachine):
    """Compares the store with the model after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.database = Database(sqlite_url(Path(self.folder.name) / "store.db"))
        blobs = Blobs(None, Path(self.folder.name) / "blobs")
        self.archives = Archives(self.database, blobs, workspace_bytes=1000, transcript_bytes=2**20)
        self.agents: dict[str, AgentState] = {}
        self.sessions: dict[str, ModelSession] = {}
        self.live: dict[str, dict[str, LiveSession]] = {}
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
        self.live[row.agent_id] = {}

    @rule()
    def open(self) -> None:
        session_id = new_session_id()

        async def place() -> str | None:
            async with self.database.write(exclusive=placement.PLACEMENT) as connection:
                return await placement.place_new(
                    connection, session_id=session_id, user_id="ada", options={}, now=self.now
                )

        agent_id = self.run(place())
        assert (agent_id is None) == (not self._has_capacity())
        if agent_id is not None:
            assert self._load(agent_id) < CAPACITY
            self.sessions[session_id] = ModelSession(agent_id, places=[(agent_id, 1)])

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), lines=st.integers(1, 3), durable=st.booleans(), file=st.booleans())
    def turn(self, data: st.DataObject, lines: int, durable: bool, file: bool) -> None:
        """Run a turn. It moves a session without a running agent and resumes one that is not live."""
        session_id, known = self._pick(data)
        lost = known.agent_id is None or self.agents[known.agent_id] is not AgentState.RUNNING

        async def go() -> sessions.SessionRow | None:
            async with self.database.write(exclusive=placement.PLACEMENT) as connection:
                await placement.place_again(connection, session_id, now=self.now)
            async with self.database.write() as connection:
                row = await turns.begin_turn(
                    connection, session_id, holder="m", max_tokens=None, temperature=None, now=self.now
                )
                if row is not None:
                    await turns.end_turn(connection, session_id, row.turn, now=self.now)
                return row

        could = not known.ended and (not lost or self._has_capacity())
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
        live = self._resumed(session_id, known)
        said = [f"{known.turns}.{number}" for number in range(lines)]
        live.lines += said
        live.unsent += said
        if durable:
            self._send(session_id, known, live)
            if file:
                live.workspace = f"{session_id} {known.turns}".encode()
                assert self._archive(session_id, known.agent_id, known.generation, live.workspace)
                known.workspace = live.workspace

    @precondition(lambda self: self._is_live())
    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        """End the session's process after its unsent entries were sent."""
        session_id, live = self._pick_live(data)
        known = self.sessions[session_id]
        assert known.agent_id is not None
        self._send(session_id, known, live)
        del self.live[known.agent_id][session_id]

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        """Check that a turn would start with the acknowledged entries and the unsent ones of its agent."""
        session_id, known = self._pick(data)
        if not known.ended and known.agent_id is not None and self.agents[known.agent_id] is AgentState.RUNNING:
            self._resumed(session_id, known)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def an_earlier_agent_writes(self, data: st.DataObject) -> None:
        """Let an agent that had the session write as if it still had it."""
        session_id, known = self._pick(data)
        agent_id, generation = data.draw(st.sampled_from(known.places))
        alive = self.agents[agent_id] in agents.LIVE_STATES
        current = not known.ended and alive and (agent_id, generation) == (known.agent_id, known.generation)
        line = f"late.{generation}.{self.now}"
        live = self.live[agent_id].get(session_id) if current else None
        if live is not None:
            return  # the current agent: its entries are sent in order, with its next turn
        assert self._append(session_id, agent_id, generation, [line]) == current
        if current and line not in known.lines:
            known.lines.append(line)
        stolen = f"stolen by {agent_id}".encode()
        assert self._archive(session_id, agent_id, generation, stolen) == current
        if current:
            known.workspace = stolen

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def unplace(self, data: st.DataObject) -> None:
        session_id, known = self._pick(data)
        self.now += 1

        async def unplace_idle() -> bool:
            async with self.database.write() as connection:
                return await placement.unplace_idle(
                    connection, session_id, known.generation, before=self.now, now=self.now
                )

        assert self.run(unplace_idle()) == (not known.ended and known.agent_id is not None)
        if not known.ended:
            if known.agent_id is not None:
                self.live[known.agent_id].pop(session_id, None)
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
                    await placement.unplace_sessions_of(connection, agent_id)

        self.run(change())
        self.agents[agent_id] = after
        if after is AgentState.FAILED:
            self.live[agent_id] = {}  # its unsent entries are lost; they were not acknowledged as durable
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
        for memory in self.live.values():
            memory.pop(session_id, None)
        known.ended, known.lines = True, []

    @invariant()
    def the_store_has_all_entries_and_no_agent_is_over_capacity(self) -> None:
        async def compare() -> None:
            async with self.database.read() as connection:
                for session_id, known in self.sessions.items():
                    stored = [entry.uuid for entry in (await transcripts.load(connection, session_id)).entries]
                    assert stored == known.lines
                    row = await sessions.get_session(connection, session_id)
                    assert row is not None
                    assert (row.state == session_lifecycle.SessionState.ENDED) == known.ended
                    if not known.ended:
                        assert (row.agent_id, row.generation) == (known.agent_id, known.generation)

        if self.agents:
            self.run(compare())
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

    def _archive(self, session_id: str, agent_id: str, generation: int, content: bytes) -> bool:
        async def chunks() -> AsyncIterator[bytes]:
            yield content

        try:
            self.run(self.archives.put_workspace(agent_id, session_id, generation, chunks()))
        except HypercoreError:
            return False
        return True

    def _send(self, session_id: str, known: ModelSession, live: LiveSession) -> None:
        """Send the unsent entries twice; the store must have them once."""
        assert known.agent_id is not None
        if live.unsent:
            for _ in range(2):
                assert self._append(session_id, known.agent_id, known.generation, live.unsent)
            known.lines += live.unsent
            live.unsent = []

    def _resumed(self, session_id: str, known: ModelSession) -> LiveSession:
        """Return the session in its agent's memory, loaded from the store if it is not live there."""
        agent_id = known.agent_id
        assert agent_id is not None
        live = self.live[agent_id].get(session_id)
        if live is None or live.generation != known.generation:
            live = self.run(self._loaded(session_id, agent_id, known.generation))
            assert live.lines == known.lines
            self.live[agent_id][session_id] = live
        assert live.lines == known.lines + live.unsent
        assert live.workspace == known.workspace
        return live

    async def _loaded(self, session_id: str, agent_id: str, generation: int) -> LiveSession:
        stored = await self.archives.load(agent_id, session_id, generation)
        workspace = None
        if stored.workspace is not None:
            pieces = await self.archives.get_workspace(agent_id, session_id, generation, stored.workspace)
            workspace = b"".join([piece async for piece in pieces])
        return LiveSession(generation, [entry.uuid for entry in stored.entries], workspace)

    def _is_live(self) -> bool:
        return any(self._live_sessions_of(agent_id) for agent_id in self.live)

    def _live_sessions_of(self, agent_id: str) -> dict[str, LiveSession]:
        """Return the sessions in an agent's memory that are still placed there."""
        return {
            session_id: live
            for session_id, live in self.live[agent_id].items()
            if (self.sessions[session_id].agent_id, self.sessions[session_id].generation) == (agent_id, live.generation)
        }

    def _pick_live(self, data: st.DataObject) -> tuple[str, LiveSession]:
        found = [pair for agent_id in self.live for pair in self._live_sessions_of(agent_id).items()]
        return found[data.draw(st.integers(0, len(found) - 1))]

    def _pick(self, data: st.DataObject) -> tuple[str, ModelSession]:
        session_id = list(self.sessions)[data.draw(st.integers(0, len(self.sessions) - 1))]
        return session_id, self.sessions[session_id]

    def _load(self, agent_id: str) -> int:
        return sum(1 for known in self.sessions.values() if known.agent_id == agent_id and not known.ended)

    def _has_capacity(self) -> bool:
        return any(
            state is AgentState.RUNNING and self._load(agent_id) < CAPACITY for agent_id, state in self.agents.items()
        )


TestMovement = Movement.TestCase
TestMovement.settings = settings(
    max_examples=15,
    stateful_step_count=30,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def accepts_any_generation(patch: pytest.MonkeyPatch) -> None:
    """A gateway that accepts writes from an agent that had the session earlier."""
    real = require_placed

    async def placed(connection: Connection, agent_id: str, session_id: str, generation: int) -> Any:
        row = await sessions.get_session(connection, session_id)
        if row is None or row.agent_id is None:
            return await real(connection, agent_id, session_id, generation)
        return await real(connection, row.agent_id, session_id, row.generation)

    real_kept = require_append_state

    async def kept(connection: Connection, agent_id: str, session_id: str, generation: int, **asked: Any) -> Any:
        row = await sessions.get_session(connection, session_id)
        if row is None or row.agent_id is None:
            return await real_kept(connection, agent_id, session_id, generation, **asked)
        return await real_kept(connection, row.agent_id, session_id, row.generation, **asked)

    patch.setattr("hypercore_agents.gateway.session_archives.require_placed", placed)
    patch.setattr("hypercore_agents.gateway.session_archives.require_append_state", kept)


def stores_only_the_last_entry(patch: pytest.MonkeyPatch) -> None:
    """A store that takes only the last entry of a request."""
    real = transcripts.append

    async def append(
        connection: Connection, session_id: str, entries: Sequence[transcripts.EntryRow], **known: Any
    ) -> None:
        await real(connection, session_id, entries[-1:], **known)

    patch.setattr(transcripts, "append", append)


def leaves_sessions_on_a_lost_agent(patch: pytest.MonkeyPatch) -> None:
    """A manager that does not unplace the sessions of a lost agent."""

    async def unplace(connection: Connection, agent_id: str) -> int:
        return 0

    patch.setattr(placement, "unplace_sessions_of", unplace)


class FixedDraws(st.DataObject):
    """The values that a walk draws, in order."""

    def __init__(self, *values: object) -> None:
        self._values = list(values)

    def draw(self, strategy: object, label: object = None) -> Any:
        return self._values.pop(0)


def walk(machine: Movement) -> None:
    """Run the machine's own rules: a session moves from a lost agent, which then writes again."""
    machine.begin()
    machine.add_agent()
    machine.open()
    machine.the_store_has_all_entries_and_no_agent_is_over_capacity()
    (known,) = machine.sessions.values()
    first = known.places[0]
    machine.turn(data=FixedDraws(0), lines=3, durable=True, file=True)
    machine.the_store_has_all_entries_and_no_agent_is_over_capacity()
    machine.an_agent_drains_or_is_lost(data=FixedDraws(first[0]), after=AgentState.FAILED)
    machine.the_store_has_all_entries_and_no_agent_is_over_capacity()
    machine.turn(data=FixedDraws(0), lines=1, durable=True, file=False)
    machine.an_earlier_agent_writes(data=FixedDraws(0, first))
    machine.the_store_has_all_entries_and_no_agent_is_over_capacity()


def test_a_session_moves_from_a_lost_agent_that_writes_again() -> None:
    machine = Movement()
    try:
        walk(machine)
    finally:
        machine.teardown()


@pytest.mark.parametrize("plant", [accepts_any_generation, stores_only_the_last_entry, leaves_sessions_on_a_lost_agent])
def test_the_machine_finds_a_planted_defect(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    machine = Movement()
    try:
        with pytest.raises(AssertionError):
            walk(machine)
    finally:
        machine.teardown()
