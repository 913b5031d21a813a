"""The fleet with a virtual clock: deadlines, pauses, missed heartbeats, fences. No test waits for real time."""

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.internal import Heartbeat
from hypercore_agents.api.pool import RollStatus
from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.testing import Fault, FaultBackend, FaultKind, MemoryBackend, MemoryHost, Operation
from hypercore_agents.kit.relay.upstream import Peer, RequestLimits, Upstream
from hypercore_agents.manager.change_signals import ChangeSignals
from hypercore_agents.manager.fleet.agent_client import AgentClient
from hypercore_agents.manager.fleet.health import AgentHealth
from hypercore_agents.manager.fleet.leadership import LEASE_SECONDS, Leadership, LeadershipLost
from hypercore_agents.manager.fleet.pool import LAST_PAUSE, PAUSE_AFTER_RUNNING, Pool, PoolShape
from hypercore_agents.manager.fleet.reconciler import READY_PAUSE, SLOT_PAUSE, TURNS_PAUSE, FleetRules, Reconciler
from hypercore_agents.manager.fleet.rows import AgentRows
from hypercore_agents.observability.metrics import ManagerMetrics
from hypercore_agents.store import agents, heartbeats, pools, rolls
from hypercore_agents.store.agents import AgentRow
from hypercore_agents.store.database import Database, sqlite_url
from hypercore_agents.store.leases import take_lease
from hypercore_agents.store.placement import place_new
from hypercore_agents.store.rolls import RollRow
from hypercore_agents.store.schema import migrate
from hypercore_agents.store.turns import begin_turn, end_turn


class Client(AgentClient):
    """An agent client whose responses the test sets."""

    def __init__(self) -> None:
        super().__init__(Upstream(peer=Peer(), limits=RequestLimits()))
        self.ready = False
        self.alive = True

    async def is_ready(self, address: str, *, seconds: float = 2.0) -> bool:
        return self.ready

    async def is_alive(self, address: str, *, seconds: float = 5.0) -> bool:
        return self.alive


class Fleet:
    """A leader with a backend in memory and a virtual clock."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.now = 1000.0
        self.host = MemoryHost()
        self.backend = FaultBackend(MemoryBackend(self.host))
        self.client = Client()
        self.metrics = ManagerMetrics(CollectorRegistry())
        self.leadership = Leadership(database, "one", self.clock)
        self.shape = PoolShape("platform", "memory", 1, 512, 2, 300, minimum=2, maximum=4, starts_at_once=2)
        self.pool = Pool(database, self.leadership, self.shape, self.clock)
        rules = FleetRules("http://gateway", start_timeout=60, health_interval=30, starts_at_once=2)
        self.gateway_ready = True
        self.health = AgentHealth(database, self.client, self.gateway, interval=30, clock=self.clock)
        self.reconciler = Reconciler(
            database=database,
            rows=AgentRows(database, self.leadership, ChangeSignals(), self.clock),
            backend=self.backend,
            client=self.client,
            health=self.health,
            rules=rules,
            metrics=self.metrics,
            clock=self.clock,
            on_ended=self.pool.ended,
        )

    def clock(self) -> float:
        return self.now

    async def gateway(self) -> bool:
        return self.gateway_ready

    async def beat(self, agent_id: str, **told: Any) -> bool:
        values = {"ready": True, "sessions": 0, "live": 0, "running": 0, "waiting": 0, "memory_mb": 100}
        beat = Heartbeat.model_validate({**values, "memory_limit_mb": 512, **told})
        async with self.database.write() as connection:
            return await heartbeats.put_heartbeat(connection, agent_id, beat, now=self.now)

    async def pass_time(self, seconds: float) -> None:
        self.now += seconds
        await self.leadership.renew()

    async def add(self, kind: AgentKind = AgentKind.DEDICATED) -> str:
        row = replace(self.shape.new_row(self.now), kind=kind)
        async with self.database.write() as connection:
            await agents.insert_agent(connection, row)
        return row.agent_id

    async def row(self, agent_id: str) -> AgentRow:
        async with self.database.read() as connection:
            row = await agents.get_agent(connection, agent_id)
        assert row is not None
        return row

    async def enrol(self, agent_id: str) -> None:
        async with self.database.write() as connection:
            assert await agents.set_bearer(connection, agent_id, b"sealed", now=self.now)

    async def run_up(self, agent_id: str) -> None:
        await self.reconciler.step(agent_id)
        await self.enrol(agent_id)
        self.client.ready = True
        await self.reconciler.step(agent_id)
        assert (await self.row(agent_id)).state is AgentState.RUNNING


@pytest_asyncio.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    database = Database(sqlite_url(tmp_path / "store.db"))
    await migrate(database)
    fleet = Fleet(database)
    await fleet.leadership.renew()
    yield fleet
    await database.close()


async def test_a_start_proceeds_step_by_step(fleet: Fleet) -> None:
    agent_id = await fleet.add()
    assert await fleet.reconciler.step(agent_id) == READY_PAUSE
    assert (await fleet.row(agent_id)).state is AgentState.STARTING
    fleet.client.ready = True
    assert await fleet.reconciler.step(agent_id) == READY_PAUSE, "the agent has not enrolled"
    await fleet.enrol(agent_id)
    await fleet.pass_time(3)
    assert await fleet.reconciler.step(agent_id) == 30
    row = await fleet.row(agent_id)
    assert (row.state, row.running_at, row.attempts) == (AgentState.RUNNING, 1003.0, 1)
    assert fleet.metrics.spawns.labels("success")._value.get() == 1


async def test_a_start_fails_at_its_deadline_and_not_before(fleet: Fleet) -> None:
    agent_id = await fleet.add()
    await fleet.reconciler.step(agent_id)
    await fleet.pass_time(59)
    assert await fleet.reconciler.step(agent_id) == READY_PAUSE
    await fleet.pass_time(2)
    assert await fleet.reconciler.step(agent_id) is None
    row = await fleet.row(agent_id)
    assert row.state is AgentState.FAILED
    assert row.error == "deadline_exceeded: the agent did not enrol with the gateway within 60 s"
    assert fleet.host.sandboxes == {}
    assert fleet.metrics.spawns.labels("failure")._value.get() == 1


@pytest.mark.parametrize("seconds", [0, 61])
async def test_an_inherited_start_is_retried_once(fleet: Fleet, seconds: float) -> None:
    """The agent may have ended, or may wait without end for a secret that it never received."""
    agent_id = await fleet.add()
    await fleet.reconciler.step(agent_id)
    fleet.reconciler.forget()  # the memory of a process that has just become the leader
    assert await fleet.reconciler.step(agent_id) == READY_PAUSE
    if seconds:
        await fleet.pass_time(seconds)
    else:
        fleet.host.exit(agent_id, 1)
    assert await fleet.reconciler.step(agent_id) == READY_PAUSE
    assert (await fleet.row(agent_id)).attempts == 2
    await fleet.enrol(agent_id)
    fleet.client.ready = True
    assert await fleet.reconciler.step(agent_id) == 30
    assert (await fleet.row(agent_id)).state is AgentState.RUNNING


async def test_an_inherited_start_that_fails_twice_is_failed(fleet: Fleet) -> None:
    agent_id = await fleet.add()
    await fleet.reconciler.step(agent_id)
    fleet.reconciler.forget()
    await fleet.reconciler.step(agent_id)
    for _ in range(2):
        fleet.host.exit(agent_id, 1)
        await fleet.reconciler.step(agent_id)
    assert (await fleet.row(agent_id)).state is AgentState.FAILED
    assert fleet.host.sandboxes == {}


async def test_concurrent_starts_are_limited(fleet: Fleet) -> None:
    ids = [await fleet.add() for _ in range(3)]
    pauses = [await fleet.reconciler.step(agent_id) for agent_id in ids]
    assert pauses == [READY_PAUSE, READY_PAUSE, SLOT_PAUSE]
    assert (await fleet.row(ids[2])).state is AgentState.PENDING
    await fleet.enrol(ids[0])
    fleet.client.ready = True
    await fleet.reconciler.step(ids[0])
    assert await fleet.reconciler.step(ids[2]) == READY_PAUSE


async def test_an_unresponsive_agent_is_lost_within_the_interval(fleet: Fleet) -> None:
    agent_id = await fleet.add()
    await fleet.run_up(agent_id)
    await fleet.beat(agent_id)
    await fleet.pass_time(14)
    assert await fleet.health.suspicious() == []
    await fleet.pass_time(2)
    assert await fleet.health.suspicious() == [agent_id]
    await fleet.beat(agent_id)
    assert await fleet.health.suspicious() == []
    fleet.client.alive = False
    assert await fleet.reconciler.step(agent_id) == 30, "an agent with heartbeats is not examined"
    await fleet.pass_time(16)
    assert await fleet.health.suspicious() == [agent_id]
    assert await fleet.reconciler.step(agent_id) is None
    row = await fleet.row(agent_id)
    assert (row.state, row.error) == (
        AgentState.FAILED,
        "agent_unreachable: the agent sent no heartbeat for 16 s and does not respond",
    )
    assert fleet.metrics.lost.labels("silent")._value.get() == 1


async def test_a_cut_off_agent_is_lost_one_heartbeat_later(fleet: Fleet) -> None:
    agent_id = await fleet.add(AgentKind.POOL)
    await fleet.run_up(agent_id)
    await fleet.beat(agent_id)
    await fleet.pass_time(16)
    assert await fleet.reconciler.step(agent_id) == 30
    await fleet.beat(agent_id)
    assert await fleet.reconciler.step(agent_id) == 30
    await fleet.pass_time(16)
    assert await fleet.reconciler.step(agent_id) == 30, "the period of missed heartbeats starts again"
    await fleet.pass_time(7)
    assert await fleet.reconciler.step(agent_id) is None
    assert "does not reach the gateway" in ((await fleet.row(agent_id)).error or "")
    assert fleet.metrics.lost.labels("cut_off")._value.get() == 1


async def test_agents_that_the_gateway_refuses_are_replaced(fleet: Fleet) -> None:
    ids = [await fleet.add(AgentKind.POOL) for _ in range(2)]
    for agent_id in ids:
        await fleet.run_up(agent_id)
        await fleet.beat(agent_id)
    await fleet.pass_time(16)
    fleet.client.ready = False
    for agent_id in ids:
        assert await fleet.reconciler.step(agent_id) is None
        row = await fleet.row(agent_id)
        assert (row.state, row.error) == (
            AgentState.FAILED,
            "unavailable: the agent sent no heartbeat for 16 s and reports that it accepts no turns",
        )
    assert fleet.metrics.lost.labels("not_ready")._value.get() == 2


async def test_a_wrong_clock_fails_no_agent(fleet: Fleet) -> None:
    ids = [await fleet.add(AgentKind.POOL) for _ in range(2)]
    for agent_id in ids:
        await fleet.run_up(agent_id)
    for seconds in (16, 7, 16, 7):
        await fleet.pass_time(seconds)
        for agent_id in ids:
            assert await fleet.reconciler.step(agent_id) == 30, "no agent sends heartbeats, and all respond"
    await fleet.beat(ids[0])
    await fleet.pass_time(8)
    for _ in range(2):
        await fleet.pass_time(6)
        await fleet.beat(ids[0])
        last = await fleet.reconciler.step(ids[1])
    assert last is None
    assert fleet.metrics.lost.labels("cut_off")._value.get() == 1


async def test_no_agent_is_lost_while_or_shortly_after_the_gateway_is_down(fleet: Fleet) -> None:
    agent_id = await fleet.add()
    await fleet.run_up(agent_id)
    fleet.client.alive = False
    fleet.gateway_ready = False
    await fleet.pass_time(16)
    assert await fleet.reconciler.step(agent_id) == 30
    fleet.gateway_ready = True
    await fleet.pass_time(14)
    assert await fleet.health.suspicious() == []
    assert await fleet.reconciler.step(agent_id) == 30
    await fleet.pass_time(2)
    assert await fleet.health.suspicious() == [agent_id]
    assert await fleet.reconciler.step(agent_id) is None


async def test_an_agent_that_accepts_no_turns_finishes_its_turn(fleet: Fleet) -> None:
    agent_id = await fleet.add(AgentKind.POOL)
    await fleet.run_up(agent_id)
    async with fleet.database.write() as connection:
        await place_new(connection, session_id="s", user_id="ada", options={}, now=fleet.now)
        await take_lease(connection, "manager:one", "m", now=fleet.now, seconds=100)
        turn = await begin_turn(connection, "s", holder="m", max_tokens=None, temperature=None, now=fleet.now)
    assert turn is not None
    await fleet.beat(agent_id, ready=False)
    assert await fleet.health.suspicious() == [agent_id]
    assert await fleet.reconciler.step(agent_id) == TURNS_PAUSE
    assert (await fleet.row(agent_id)).state is AgentState.DRAINING
    assert agent_id in fleet.host.sandboxes
    async with fleet.database.write() as connection:
        await end_turn(connection, "s", turn.turn, now=fleet.now)
    assert await fleet.reconciler.step(agent_id) is None
    assert fleet.metrics.lost.labels("not_ready")._value.get() == 1
    assert not await fleet.beat(agent_id), "the turn has ended"


async def test_a_stop_that_fails_leaves_the_agent_draining(fleet: Fleet) -> None:
    agent_id = await fleet.add()
    await fleet.run_up(agent_id)
    async with fleet.database.write() as connection:
        await agents.want_stopped(connection, agent_id, now=fleet.now)
    fleet.backend.inject(Operation.STOP, Fault(FaultKind.FAILS, times=1))
    with pytest.raises(SandboxError):
        await fleet.reconciler.step(agent_id)
    assert (await fleet.row(agent_id)).state is AgentState.DRAINING
    assert await fleet.reconciler.step(agent_id) is None
    assert (await fleet.row(agent_id)).state is AgentState.STOPPED


async def test_a_leader_without_its_lease_changes_nothing(fleet: Fleet) -> None:
    agent_id = await fleet.add()
    fleet.now += LEASE_SECONDS + 1
    successor = Leadership(fleet.database, "two", fleet.clock)
    assert await successor.renew()
    assert await fleet.reconciler.step(agent_id) is None
    assert (await fleet.row(agent_id)).state is AgentState.PENDING
    assert fleet.host.sandboxes == {}
    assert not fleet.leadership.leads
    with pytest.raises(LeadershipLost):
        await fleet.pool.balance()
    await successor.release()
    assert await fleet.leadership.renew()
    assert await fleet.reconciler.step(agent_id) == READY_PAUSE


async def test_a_new_leader_adopts_a_start_in_progress(fleet: Fleet) -> None:
    agent_id = await fleet.add()
    await fleet.reconciler.step(agent_id)
    successor = Fleet(fleet.database)
    successor.now = fleet.now + LEASE_SECONDS + 1
    successor.backend = fleet.backend
    successor.reconciler._backend = fleet.backend
    assert await successor.leadership.renew()
    await successor.enrol(agent_id)
    successor.client.ready = True
    assert await successor.reconciler.step(agent_id) == 30
    row = await fleet.row(agent_id)
    assert (row.state, row.attempts) == (AgentState.RUNNING, 1)


async def test_the_pool_starts_a_few_agents_at_a_time_up_to_its_size(fleet: Fleet) -> None:
    async with fleet.database.write() as connection:
        await pools.set_pool(connection, 9, version=None, now=1.0)
    assert len(await fleet.pool.balance()) == 2
    assert await fleet.pool.balance() == [], "two agents are starting"
    async with fleet.database.read() as connection:
        first = await agents.list_agents(connection, kind=AgentKind.POOL)
    for row in first:
        await fleet.run_up(row.agent_id)
    assert len(await fleet.pool.balance()) == 2
    async with fleet.database.read() as connection:
        every = await agents.list_agents(connection, kind=AgentKind.POOL)
    for row in (row for row in every if row.state is AgentState.PENDING):
        await fleet.run_up(row.agent_id)
    assert await fleet.pool.balance() == [], "MAX_AGENTS is 4"


async def test_the_pool_is_never_under_its_minimum(fleet: Fleet) -> None:
    async with fleet.database.write() as connection:
        await pools.set_pool(connection, 0, version=None, now=1.0)
    assert len(await fleet.pool.balance()) == 2


async def test_failed_agents_of_the_pool_are_replaced_with_backoff(fleet: Fleet) -> None:
    async def fail_all() -> int:
        started = await fleet.pool.balance()
        for agent_id in started:
            fleet.pool.ended(replace(await fleet.row(agent_id), state=AgentState.FAILED))
            async with fleet.database.write() as connection:
                row = await fleet.row(agent_id)
                await agents.change_agent(connection, agent_id, row.version, now=fleet.now, state=AgentState.FAILED)
        return len(started)

    assert await fail_all() == 2
    assert await fail_all() == 0, "two failures in a row: a pause of one second"
    await fleet.pass_time(1.1)
    assert await fail_all() == 2
    await fleet.pass_time(1.1)
    assert await fail_all() == 0
    for _ in range(12):
        await fleet.pass_time(LAST_PAUSE + 1)
        assert await fail_all() == 2, "the pause is bounded"


async def test_agents_that_fail_after_running_are_replaced_with_a_short_pause(fleet: Fleet) -> None:
    """Whatever the cause, such as a host without memory, the pool is not empty for minutes."""
    for _ in range(8):
        started = await fleet.pool.balance()
        assert len(started) == 2
        for agent_id in started:
            await fleet.run_up(agent_id)
        for agent_id in started:
            fleet.host.exit(agent_id, -9)
            assert await fleet.reconciler.step(agent_id) is None
        await fleet.pass_time(PAUSE_AFTER_RUNNING + 0.1)


async def test_an_agent_that_ran_well_is_replaced_at_once(fleet: Fleet) -> None:
    for agent_id in await fleet.pool.balance():
        await fleet.run_up(agent_id)
    await fleet.pass_time(3600)
    fleet.host.exit(agent_id, 1)
    assert await fleet.reconciler.step(agent_id) is None
    assert len(await fleet.pool.balance()) == 1


async def test_a_new_leader_continues_a_roll(fleet: Fleet) -> None:
    old = set(await fleet.pool.balance())
    for agent_id in old:
        await fleet.run_up(agent_id)
    roll = RollRow(1, {"config": {"cores": 3}}, 0, {}, RollStatus.ROLLING, 1, None, fleet.now, None)
    async with fleet.database.write() as connection:
        await rolls.put_roll(connection, roll)
    (first,) = await fleet.pool.balance()
    await fleet.run_up(first)

    successor = Fleet(fleet.database)
    successor.now = fleet.now + LEASE_SECONDS + 1
    successor.backend = successor.reconciler._backend = fleet.backend
    successor.client.ready = True
    assert await successor.leadership.renew()
    for _ in range(12):
        await successor.pool.balance()
        async with fleet.database.read() as connection:
            rows = await agents.list_agents(connection)
        for row in (row for row in rows if row.state is not AgentState.RUNNING or row.wanted == "stopped"):
            await successor.reconciler.step(row.agent_id)
            if (await fleet.row(row.agent_id)).state is AgentState.STARTING:
                await successor.enrol(row.agent_id)
    async with fleet.database.read() as connection:
        rows = await agents.list_agents(connection)
        ended = await rolls.get_roll(connection)
    assert ended is not None
    assert ended.status is RollStatus.DONE
    assert [(row.revision, row.cores) for row in rows] == [(1, 3), (1, 3)]
    assert first in {row.agent_id for row in rows}


async def test_a_survey_distinguishes_lost_from_unfinished(fleet: Fleet) -> None:
    running, starting = await fleet.add(), await fleet.add()
    await fleet.run_up(running)
    await fleet.reconciler.step(starting)
    survey = await fleet.reconciler.survey()
    assert (survey.lost, survey.running, survey.unfinished) == ([], [running], [starting])
    fleet.host.exit(running, 1)
    assert (await fleet.reconciler.survey()).lost == [running]


async def test_the_virtual_clock_does_not_wait(fleet: Fleet) -> None:
    began = time.monotonic()
    agent_id = await fleet.add()
    await fleet.reconciler.step(agent_id)
    await fleet.pass_time(61)
    await fleet.reconciler.step(agent_id)
    assert time.monotonic() - began < 5
