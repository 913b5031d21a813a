"""What the pool's next step is: how many to start, whom to drain, whether a roll is over. Pure.

Sizes. Agents that shall run are kept at `desired`; what still drains counts against `maximum`, since it still takes
room. Who is too many: whoever does not run yet, then the emptiest, then the youngest.

A roll replaces agents of other revisions, `at_once` at a time. Where there is room under `maximum` new ones are started
first and old ones drained as new ones become ready, so the pool never has fewer than `desired`; where there is none (or
the host said so), old ones are drained first. A roll stops when new agents fail one after the other; the pool then
starts agents as it did before the roll, and those that already are new and run well stay.

Everything is read from rows, so whoever leads next goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hypercore_agents.api.agents import AgentState
from hypercore_agents.api.errors import AtCapacity
from hypercore_agents.api.pool import RollStatus
from hypercore_agents.store.agents import WANTED_RUNNING, AgentRow
from hypercore_agents.store.rolls import FailedStart, RollRow

FAILURES_ALLOWED = 1
"""So many new agents may fail, one after the other, before a roll stops."""


@dataclass(frozen=True)
class Pool:
    """The pool as it is: its live agents, how many sessions are placed on each, and what it shall be."""

    rows: Sequence[AgentRow]
    placed: Mapping[str, int]
    desired: int
    maximum: int
    starts_allowed: int
    roll: RollRow | None = None
    failed: Sequence[FailedStart] = ()


@dataclass(frozen=True)
class Step:
    """What to do now. `ends` is set when the roll is over, `reason` when it stops."""

    start: int = 0
    drain: list[str] = field(default_factory=list)
    ends: RollStatus | None = None
    reason: str | None = None


def next_step(pool: Pool) -> Step:
    """Return the pool's next step."""
    kept = [row for row in pool.rows if row.state is not AgentState.DRAINING and row.wanted == WANTED_RUNNING]
    if pool.roll is None or pool.roll.status is not RollStatus.ROLLING:
        surplus = _emptiest(kept, pool.placed)[: max(0, len(kept) - pool.desired)]
        return Step(_startable(pool.desired - len(kept), kept, pool), _ids(surplus))
    failed = [start for start in pool.failed if not _no_room(start)]
    no_room = [start for start in pool.failed if _no_room(start)]
    fresh = [row for row in kept if row.revision == pool.roll.revision]
    if len(failed) + max(0, len(no_room) - 1) > FAILURES_ALLOWED:
        starting = [row for row in fresh if row.state is not AgentState.RUNNING]
        last = (failed or no_room)[-1]
        reason = f"{len(pool.failed)} new agents failed in a row; {last.agent_id}: {last.error}"
        return Step(drain=_ids(starting), ends=RollStatus.STOPPED, reason=reason[:2000])
    return _roll_on(pool, pool.roll, kept, fresh, surges=not no_room)


def _roll_on(pool: Pool, roll: RollRow, kept: Sequence[AgentRow], fresh: Sequence[AgentRow], *, surges: bool) -> Step:
    old = [row for row in kept if row.revision != roll.revision]
    idle = [row for row in old if row.state is not AgentState.RUNNING]  # nobody is on them: no reason to wait
    kept = [row for row in kept if row not in idle]
    running = [row for row in kept if row.state is AgentState.RUNNING]
    starting = [row for row in fresh if row.state is not AgentState.RUNNING]
    old = [row for row in old if row not in idle]
    leaving = sum(row.state is AgentState.DRAINING and row.revision != roll.revision for row in pool.rows)
    if not old and not idle and not starting and len(kept) == pool.desired:
        return Step(ends=RollStatus.DONE)
    surge = min(roll.at_once, max(0, pool.maximum - pool.desired)) if surges else 0
    missing = max(0, pool.desired - len(kept))
    in_flight = len(starting) + leaving
    extra = pool.desired + min(surge, len(old)) - max(len(kept), pool.desired)
    start = missing + max(0, min(extra, roll.at_once - in_flight - missing))
    if surge:
        drainable = min(len(running) - pool.desired, roll.at_once - leaving)
    else:
        drainable = roll.at_once - max(leaving, pool.desired - len(running))
    going = _emptiest(old, pool.placed)[: max(0, drainable)]
    too_many = len(kept) - len(going) - pool.desired - surge
    if too_many > 0:  # the pool was made smaller meanwhile: old ones go first
        staying = [row for row in kept if row not in going]
        going += sorted(_emptiest(staying, pool.placed), key=lambda row: row.revision == roll.revision)[:too_many]
    elif not old:
        going += _emptiest(kept, pool.placed)[: max(0, len(kept) - pool.desired)]
    return Step(_startable(start, kept, pool), _ids(idle) + _ids(going))


def _startable(wanted: int, kept: Sequence[AgentRow], pool: Pool) -> int:
    starting = sum(row.state is not AgentState.RUNNING for row in kept)
    return max(0, min(wanted, pool.starts_allowed - starting, pool.maximum - len(pool.rows)))


def _emptiest(rows: Sequence[AgentRow], placed: Mapping[str, int]) -> list[AgentRow]:
    return sorted(rows, key=lambda row: (row.state is AgentState.RUNNING, placed.get(row.agent_id, 0), -row.created_at))


def _ids(rows: Sequence[AgentRow]) -> list[str]:
    return [row.agent_id for row in rows]


def _no_room(start: FailedStart) -> bool:
    return start.error.startswith(f"{AtCapacity.type}: ")
