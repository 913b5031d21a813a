"""Decides the pool's next step: how many agents to start, which to drain, whether a roll has ended. Pure.

Size: the number of agents wanted running is held at `desired`. Draining agents count against `maximum`, because they
still use the host's resources. Surplus agents are drained in this order: not yet running, fewest sessions, youngest.

A roll replaces agents of other revisions, `at_once` at a time. If `maximum` allows more agents, new ones are started
first and old ones drained as new ones become ready, so the pool never has fewer than `desired`. Otherwise, or if the
host reports that it is full, old ones are drained first. A roll stops when new agents fail in a row; the pool then
starts agents of the previous revision, and running agents of the new revision stay.

All input comes from rows, so the next leader continues a roll.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hypercore_agents.api.agents import AgentState
from hypercore_agents.api.errors import AtCapacity
from hypercore_agents.api.pool import RollStatus
from hypercore_agents.store.agents import WANTED_RUNNING, AgentRow
from hypercore_agents.store.rolls import FailedStart, RollRow

FAILURES_ALLOWED = 1
"""Number of new agents that may fail in a row without stopping the roll."""


@dataclass(frozen=True)
class Pool:
    """The pool's current state (live agents, sessions placed on each) and its desired state."""

    rows: Sequence[AgentRow]
    placed: Mapping[str, int]
    desired: int
    maximum: int
    starts_allowed: int
    roll: RollRow | None = None
    failed: Sequence[FailedStart] = ()


@dataclass(frozen=True)
class Step:
    """What to do now. `ends` is set when the roll ends, `reason` when it stops early."""

    start: int = 0
    drain: list[str] = field(default_factory=list)
    ends: RollStatus | None = None
    reason: str | None = None


def next_step(pool: Pool) -> Step:
    """Return the pool's next step."""
    wanted = [row for row in pool.rows if row.state is not AgentState.DRAINING and row.wanted == WANTED_RUNNING]
    if pool.roll is None or pool.roll.status is not RollStatus.ROLLING:
        surplus = _emptiest(wanted, pool.placed)[: max(0, len(wanted) - pool.desired)]
        return Step(_startable(pool.desired - len(wanted), wanted, pool), _ids(surplus))
    failed = [start for start in pool.failed if not _is_host_full(start)]
    host_full = [start for start in pool.failed if _is_host_full(start)]
    new = [row for row in wanted if row.revision == pool.roll.revision]
    if len(failed) + max(0, len(host_full) - 1) > FAILURES_ALLOWED:
        starting = [row for row in new if row.state is not AgentState.RUNNING]
        last = (failed or host_full)[-1]
        reason = f"{len(pool.failed)} new agents failed in a row; {last.agent_id}: {last.error}"
        return Step(drain=_ids(starting), ends=RollStatus.STOPPED, reason=reason[:2000])
    return _roll_on(pool, pool.roll, wanted, new, may_surge=not host_full)


def _roll_on(
    pool: Pool, roll: RollRow, wanted: Sequence[AgentRow], new: Sequence[AgentRow], *, may_surge: bool
) -> Step:
    old = [row for row in wanted if row.revision != roll.revision]
    unstarted = [row for row in old if row.state is not AgentState.RUNNING]  # without sessions: drained at once
    wanted = [row for row in wanted if row not in unstarted]
    running = [row for row in wanted if row.state is AgentState.RUNNING]
    starting = [row for row in new if row.state is not AgentState.RUNNING]
    old = [row for row in old if row not in unstarted]
    leaving = sum(row.state is AgentState.DRAINING and row.revision != roll.revision for row in pool.rows)
    if not old and not unstarted and not starting and len(wanted) == pool.desired:
        return Step(ends=RollStatus.DONE)
    surge = min(roll.at_once, max(0, pool.maximum - pool.desired)) if may_surge else 0
    missing = max(0, pool.desired - len(wanted))
    in_flight = len(starting) + leaving
    extra = pool.desired + min(surge, len(old)) - max(len(wanted), pool.desired)
    start = missing + max(0, min(extra, roll.at_once - in_flight - missing))
    if surge:
        drainable = min(len(running) - pool.desired, roll.at_once - leaving)
    else:
        drainable = roll.at_once - max(leaving, pool.desired - len(running))
    drained = _emptiest(old, pool.placed)[: max(0, drainable)]
    too_many = len(wanted) - len(drained) - pool.desired - surge
    if too_many > 0:  # the desired size was lowered during the roll: old agents go first
        staying = [row for row in wanted if row not in drained]
        drained += sorted(_emptiest(staying, pool.placed), key=lambda row: row.revision == roll.revision)[:too_many]
    elif not old:
        drained += _emptiest(wanted, pool.placed)[: max(0, len(wanted) - pool.desired)]
    return Step(_startable(start, wanted, pool), _ids(unstarted) + _ids(drained))


def _startable(count: int, wanted: Sequence[AgentRow], pool: Pool) -> int:
    starting = sum(row.state is not AgentState.RUNNING for row in wanted)
    return max(0, min(count, pool.starts_allowed - starting, pool.maximum - len(pool.rows)))


def _emptiest(rows: Sequence[AgentRow], placed: Mapping[str, int]) -> list[AgentRow]:
    return sorted(rows, key=lambda row: (row.state is AgentState.RUNNING, placed.get(row.agent_id, 0), -row.created_at))


def _ids(rows: Sequence[AgentRow]) -> list[str]:
    return [row.agent_id for row in rows]


def _is_host_full(start: FailedStart) -> bool:
    return start.error.startswith(f"{AtCapacity.type}: ")
