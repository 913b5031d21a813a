"""The order of waiting turns: for a session in the manager, and for capacity in an agent.

Turns arrive, end and are cancelled in any order. The turns of one user are served in order, and users in turn.
"""

import asyncio
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypercore_agents.agent.sessions.capacity import LiveCapacity, SlotHolder
from hypercore_agents.agent.sessions.cli_state import CliStatus
from hypercore_agents.api.chat import ChatRequest
from hypercore_agents.api.errors import AtCapacity, Conflict, NotFound, Unavailable
from hypercore_agents.api.ids import new_session_id
from hypercore_agents.api.options import SessionOptions
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.manager.change_signals import ChangeSignals
from hypercore_agents.manager.fleet.directory import AgentDirectory
from hypercore_agents.manager.rate_limits import RateLimits
from hypercore_agents.manager.sessions import turns
from hypercore_agents.manager.sessions.placement import OptionDefaults, Placements, UserShares
from hypercore_agents.manager.sessions.turns import BegunTurn, TurnDefaults, Turns
from hypercore_agents.store import agents, leases, placement
from hypercore_agents.store.database import Database, sqlite_url
from hypercore_agents.store.schema import migrate
from support.store_rows import AGENT
from support.waiting import until

_FEW = settings(max_examples=8, deadline=None)
_MANY = settings(max_examples=100, deadline=None)


@dataclass
class QueuedSession:
    """One session in a real store, and its turns that have begun."""

    turns: Turns
    session_id: str
    begun: list[tuple[int, BegunTurn]] = field(default_factory=list)

    async def begin(self, number: int, when_busy: Any = "queue", user_id: str = "ada") -> None:
        request = ChatRequest(prompt="hi", user_id=user_id, session_id=self.session_id, when_busy=when_busy)
        self.begun.append((number, await self.turns.begin(request)))


@asynccontextmanager
async def queued_session() -> AsyncIterator[QueuedSession]:
    with tempfile.TemporaryDirectory() as folder:
        database = Database(sqlite_url(Path(folder) / "store.db"))
        await migrate(database)
        session_id, now = new_session_id(), time.time()
        sealer = SimpleNamespace(open=lambda sealed, owner: "bearer")
        async with database.write() as connection:
            await agents.insert_agent(connection, replace(AGENT, bearer_sealed=b"sealed"))
            assert await leases.take_lease(connection, "manager:m", "m", now=now, seconds=1000)
            await placement.place_new(connection, session_id=session_id, user_id="ada", options={}, now=now)
        directory = AgentDirectory(database, cast(Any, sealer))
        placements = Placements(
            database=database,
            directory=directory,
            reclaimer=cast(Any, None),
            defaults=OptionDefaults(SessionOptions(), SessionOptions()),
            shares=UserShares(),
            clock=time.time,
        )
        turns = Turns(
            database=database,
            directory=directory,
            placements=placements,
            changes=ChangeSignals(),
            limits=RateLimits(database, per_minute=0, per_hour=0, clock=time.time),
            defaults=TurnDefaults(),
            holder="m",
            clock=time.time,
        )
        yield QueuedSession(turns, session_id)
        await database.close()


@_FEW
@given(st.lists(st.sampled_from(("arrive", "end", "leave")), min_size=1, max_size=14))
def test_turns_of_a_session_are_served_in_order(steps: list[str]) -> None:
    async def run() -> None:
        async with queued_session() as served:
            expected: list[int] = []
            waiting: deque[tuple[int, asyncio.Task[None]]] = deque()
            busy = False
            for number, step in enumerate([*steps, *["end"] * len(steps)]):
                if step == "arrive":
                    waiting.append((number, asyncio.create_task(served.begin(number))))
                    # queued before the next one arrives
                    await until(lambda: len(served.turns._queues._tickets.get(served.session_id, ())) == len(waiting)
                                or len(served.begun) > len(expected))  # fmt: skip
                elif step == "leave" and len(waiting) > 1:
                    left = waiting[len(waiting) // 2]
                    waiting.remove(left)
                    left[1].cancel()
                    await asyncio.wait((left[1],))
                elif step == "end" and busy:
                    await served.turns.end(served.begun[-1][1])
                    busy = False
                if not busy and waiting:
                    first, task = waiting.popleft()
                    expected.append(first)
                    busy = True
                    await task
                assert [number for number, _ in served.begun] == expected
            assert not served.turns._queues.has_queued(served.session_id)

    asyncio.run(run())


async def test_a_turn_that_waits_too_long_is_refused_with_retry_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "QUEUE_SECONDS", 0.3)
    monkeypatch.setattr(turns, "PATIENCE", 0.05)
    async with queued_session() as served:
        await served.begin(0)
        with pytest.raises(Unavailable, match="is still running a turn") as late:
            await served.begin(1)
        assert late.value.retry_after == 5
        with pytest.raises(NotFound):
            await served.begin(1, user_id="bob")
        monkeypatch.setattr(turns, "QUEUE_SECONDS", 60.0)
        waiting = asyncio.create_task(served.begin(2))
        await until(lambda: served.turns._queues.has_queued(served.session_id))
        with pytest.raises(Conflict):
            await served.begin(3, "refuse")
        await served.turns.end(served.begun[0][1])
        await waiting
        assert [number for number, _ in served.begun] == [0, 2]


class StandInSession:
    """The part of a session that capacity needs. It has a turn until a test ends that."""

    def __init__(self, user_id: str) -> None:
        self.user_id = user_id
        self.guard = asyncio.Lock()
        self.has_prewarmed = False
        self.status = CliStatus()
        self.turn: object | None = "turn"
        self.used_at = 0.0
        self.jobs = SimpleNamespace(running=False)

    async def park(self, reason: str) -> bool:
        return self.turn is None


_STEPS = st.one_of(
    st.tuples(st.just("arrive"), st.sampled_from(("ada", "bob", "eve"))),
    st.tuples(st.sampled_from(("end", "leave")), st.integers(0, 9)),
)


@_MANY
@given(limit=st.integers(1, 3), steps=st.lists(_STEPS, min_size=1, max_size=40))
def test_slots_go_to_users_in_turn_and_to_each_users_turns_in_order(limit: int, steps: list[tuple[str, Any]]) -> None:
    async def run() -> None:
        all_sessions: list[StandInSession] = []
        tasks = Tasks("test")
        capacity = LiveCapacity(
            limit,
            timeout=60,
            sessions=lambda: cast(list[SlotHolder], all_sessions),
            tasks=tasks,
            on_parked=lambda: None,
        )
        waiting: dict[StandInSession, asyncio.Task[None]] = {}
        entering: list[asyncio.Task[None]] = []
        passed: dict[StandInSession, list[str]] = {}

        async def enter(session: StandInSession) -> None:
            await capacity.enter(cast(SlotHolder, session))
            waiting.pop(session)
            if session not in passed:
                return
            # no earlier turn of the same user waits, and no other user was admitted twice while this one waited
            ahead = [other for other in passed if other.user_id == session.user_id and other in waiting]
            assert all(all_sessions.index(other) > all_sessions.index(session) for other in ahead)
            before = passed.pop(session)
            assert max((before.count(user) for user in set(before)), default=0) <= 1, before
            for other in [s for s in passed if s.user_id == session.user_id]:
                passed[other] = []  # restarts for the user's next turn
            for other, others in passed.items():
                if other.user_id != session.user_id:
                    others.append(session.user_id)

        async def run_tasks() -> None:
            for _ in range(20):
                await asyncio.sleep(0)

        for what, which in steps:
            busy = [session for session in all_sessions if session.status.holds_slot and session.turn is not None]
            queued = [session for session in passed if session in waiting]
            if what == "arrive":
                session = StandInSession(which)
                all_sessions.append(session)
                if len(busy) >= limit or queued:
                    passed[session] = []
                waiting[session] = asyncio.create_task(enter(session))
                entering.append(waiting[session])
            elif what == "end" and busy:
                busy[which % len(busy)].turn = None
                capacity.notify_change()
            elif what == "leave" and queued:
                left = queued[which % len(queued)]
                passed.pop(left)
                waiting.pop(left).cancel()
            await run_tasks()
            busy = [session for session in all_sessions if session.status.holds_slot and session.turn is not None]
            assert capacity.used <= limit
            assert len(busy) == limit or not waiting, "no turn waits while a slot is free"
        for session in all_sessions:
            session.turn = None
            capacity.notify_change()
            await run_tasks()
        assert not waiting
        for task in entering:
            assert task.cancelled() or task.result() is None
        assert capacity.waiting == 0
        await tasks.close()

    asyncio.run(run())


async def test_a_turn_without_a_free_slot_is_refused_with_retry_after() -> None:
    tasks = Tasks("test")
    busy, late = StandInSession("ada"), StandInSession("bob")
    capacity = LiveCapacity(
        1, timeout=0.01, sessions=lambda: cast(list[SlotHolder], [busy]), tasks=tasks, on_parked=lambda: None
    )
    await capacity.enter(cast(SlotHolder, busy))
    with pytest.raises(AtCapacity) as raised:
        await capacity.enter(cast(SlotHolder, late))
    assert (raised.value.status, raised.value.retry_after is not None) == (503, True)
    await tasks.close()
