"""Simulates the pool's steps on a table of rows, for any size, limits and failures."""

from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from hypercore_agents.api.agents import AgentState
from hypercore_agents.api.pool import RollStatus
from hypercore_agents.manager.fleet.pool import PoolShape
from hypercore_agents.manager.fleet.rolling import Pool, next_step
from hypercore_agents.store.agents import WANTED_STOPPED, AgentRow
from hypercore_agents.store.rolls import FailedStart, RollRow

SHAPE = PoolShape("platform", "memory", 1, 512, 10, 300, minimum=0, maximum=1000)


def roll_to(revision: int, at_once: int) -> RollRow:
    return RollRow(revision, {}, revision - 1, {}, RollStatus.ROLLING, at_once, None, 0.0, None)


@dataclass
class Play:
    """A pool whose starts and drains take one round each."""

    rows: list[AgentRow]
    desired: int
    maximum: int
    roll: RollRow | None
    fails: bool = False
    failed: tuple[FailedStart, ...] = ()
    clock: float = 1.0

    def running(self) -> int:
        return sum(row.state is AgentState.RUNNING for row in self.rows)

    def round(self, *, starts_allowed: int = 100, finish: bool = True) -> None:
        """Finish the starts and drains in progress, then take the next step."""
        if finish:
            self.rows = [row for row in self.rows if row.state is not AgentState.DRAINING]
            for row in [row for row in self.rows if row.state is AgentState.PENDING]:
                self.rows.remove(row)
                if self.fails and self.roll is not None and row.revision == self.roll.revision:
                    self.failed += (FailedStart(row.agent_id, "deadline_exceeded: it was not ready"),)
                else:
                    self.rows.append(replace(row, state=AgentState.RUNNING))
        placed = {row.agent_id: number for number, row in enumerate(self.rows)}
        step = next_step(Pool(self.rows, placed, self.desired, self.maximum, starts_allowed, self.roll, self.failed))
        self.clock += 1
        shape = SHAPE.of_roll(self.roll)
        self.rows = [
            replace(row, state=AgentState.DRAINING, wanted=WANTED_STOPPED) if row.agent_id in step.drain else row
            for row in self.rows
        ] + [shape.new_row(self.clock) for _ in range(step.start)]
        if step.ends is not None and self.roll is not None:
            self.roll = replace(self.roll, status=step.ends, reason=step.reason)

    def settle(self) -> None:
        for _ in range(20 * (self.desired + len(self.rows)) + 20):
            self.round()


def running_pool(size: int, *, maximum: int, roll: RollRow | None = None, fails: bool = False) -> Play:
    rows = [replace(SHAPE.new_row(float(number)), state=AgentState.RUNNING) for number in range(size)]
    return Play(rows, size, maximum, roll, fails)


@given(size=st.integers(0, 12), spare=st.integers(0, 4), at_once=st.integers(1, 5))
def test_a_roll_replaces_all_agents_within_its_limits(size: int, spare: int, at_once: int) -> None:
    play = running_pool(size, maximum=size + spare, roll=roll_to(1, at_once))
    least, most = play.running(), 0
    for _ in range(20 * size + 20):
        play.round()
        least = min(least, play.running())
        most = max(most, len(play.rows))
    assert play.roll is not None
    assert play.roll.status is RollStatus.DONE
    assert [row.revision for row in play.rows] == [1] * size
    assert most <= size + spare, "never over MAX_AGENTS, drains included"
    if spare:
        assert least >= size, "new agents are ready before old ones drain"
    else:
        assert least >= size - at_once, "a few at a time"


@given(size=st.integers(1, 12), spare=st.integers(0, 4), at_once=st.integers(1, 5))
def test_a_failing_roll_stops_and_the_pool_recovers(size: int, spare: int, at_once: int) -> None:
    play = running_pool(size, maximum=size + spare, roll=roll_to(1, at_once), fails=True)
    least = size
    for _ in range(20 * size + 20):
        play.round()
        least = min(least, play.running())
    assert play.roll is not None
    assert play.roll.status is RollStatus.STOPPED
    assert "it was not ready" in (play.roll.reason or "")
    assert [row.revision for row in play.rows] == [0] * size
    assert least >= (size if spare else size - 2 * at_once)


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(0, 10),
    then=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4), st.booleans()), max_size=6),
    at_once=st.integers(1, 4),
    rolls=st.booleans(),
    starts=st.integers(1, 4),
)
def test_a_pool_resized_during_a_roll_ends_at_its_size(
    size: int, then: list[tuple[int, int, bool]], at_once: int, rolls: bool, starts: int
) -> None:
    play = running_pool(size, maximum=12, roll=roll_to(1, at_once) if rolls else None)
    for desired, rounds, finish in then:
        play.desired = desired
        for _ in range(rounds):
            play.round(starts_allowed=starts, finish=finish)
            assert len(play.rows) <= 12
            starting = sum(row.state is AgentState.PENDING for row in play.rows)
            assert starting <= starts
    play.settle()
    assert play.running() == len(play.rows) == play.desired
    if play.roll is not None:
        assert play.roll.status is RollStatus.DONE
        assert {row.revision for row in play.rows} <= {1}


def test_starting_agents_are_drained_first_then_the_emptiest() -> None:
    play = running_pool(4, maximum=9)
    placed = dict(zip([row.agent_id for row in play.rows], (5, 1, 0, 3), strict=True))
    starting = SHAPE.new_row(9.0)
    step = next_step(Pool([*play.rows, starting], placed, desired=2, maximum=9, starts_allowed=3))
    assert step.drain == [starting.agent_id, play.rows[2].agent_id, play.rows[1].agent_id]


def test_a_full_host_drains_old_agents_before_new_ones_start() -> None:
    play = running_pool(2, maximum=9, roll=roll_to(1, 1))
    full = FailedStart("agent-x", "at_capacity: the host is full")
    pool = Pool(play.rows, {}, 2, 9, 3, play.roll, [full])
    assert len(next_step(pool).drain) == 1
    assert next_step(replace(pool, failed=[full, full, full])).ends is RollStatus.STOPPED
