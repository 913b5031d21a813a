"""The autoscaler's loop: read the pool's size and the signals, decide, set the new size, record the reason.

Invariants: steps run one at a time, each within a time limit. A step changes only the pool's desired size, by
compare-and-set, so the loop can stop at any moment without harm. After a conflict, the next step decides for the size
that the other writer set. A step that cannot read its input keeps the size and records the problem in the log, the
metrics and the decision.

Rejected: an immediate retry after a conflict (the decision was made for another size); keeping the size between steps
(the manager is the source of truth).
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from hypercore_agents.api.errors import Conflict, HypercoreError
from hypercore_agents.api.pool import (
    PoolSize,
    ScalingAction,
    ScalingDecision,
    ScalingDecisions,
    ScalingReason,
    SignalProblem,
    SizeOutcome,
)
from hypercore_agents.autoscaler.policy import Decision, PolicySettings, PolicyState, decide
from hypercore_agents.autoscaler.pool_client import PoolClient
from hypercore_agents.autoscaler.signals import Reading, SignalSource
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.observability.metrics import AutoscalerMetrics

_log = structlog.get_logger(__name__)
_LATE_STEPS = 3
_QUIET = {ScalingReason.STEADY, ScalingReason.STABILISING}


@dataclass
class Condition:
    """Result of the last step: the problem of each part or None, and its end in Unix seconds."""

    manager: str | None = "not checked yet"
    signals: str | None = "not checked yet"
    ended_at: float | None = None


class Autoscaler:
    """Adjusts the pool's desired size to its load. `clock` returns Unix seconds."""

    def __init__(
        self,
        pool: PoolClient,
        signals: SignalSource,
        policy: PolicySettings,
        metrics: AutoscalerMetrics,
        *,
        retained_decisions: int = 500,
        dry_run: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._pool = pool
        self._signals = signals
        self._policy = policy
        self._metrics = metrics
        self._dry_run = dry_run
        self._clock = clock
        self._now = 0.0
        self._state = PolicyState()
        self._decisions: deque[ScalingDecision] = deque(maxlen=retained_decisions)
        self._tasks = Tasks("autoscaler")
        self.condition = Condition()

    def start(self) -> None:
        """Start the loop with one step every `policy.interval` seconds."""
        self._tasks.repeat("step", self.step, every=self._policy.interval)

    async def close(self) -> None:
        """Stop the loop; the pool keeps its size."""
        await self._tasks.close()

    def decisions(self, limit: int) -> ScalingDecisions:
        """Return the newest decisions, newest first."""
        return ScalingDecisions(dry_run=self._dry_run, decisions=list(reversed(self._decisions))[:limit])

    def problems(self) -> dict[str, str | None]:
        """Return the problem of each part, None for a healthy part."""
        problems = {"manager": self.condition.manager, "signals": self.condition.signals, "loop": None}
        ended = self.condition.ended_at
        if ended is not None and self._clock() - ended > _LATE_STEPS * self._policy.interval + 30:
            problems["loop"] = f"the last step ended {self._clock() - ended:.0f} s ago"
        return problems

    async def step(self) -> None:
        """Run one step: read, decide, set."""
        started = time.perf_counter()
        try:
            size = await self._pool.get()
        except HypercoreError as error:
            self._record_unreadable_size(error)
        else:
            self.condition.manager = None
            reading = await self._signals.read()
            await self._decide(size, reading)
        self._metrics.step_seconds.observe(time.perf_counter() - started)
        self.condition.ended_at = self._clock()

    async def _decide(self, size: PoolSize, reading: Reading) -> None:
        self.condition.signals = reading.detail
        if reading.problem is not None:
            self._metrics.problems.labels(reading.problem).inc()
        decision, self._state = decide(reading.observation, size.desired, self._policy, self._state, self._tick())
        outcome, problem = await self._set(decision, size)
        self._metrics.wanted.set(decision.desired if outcome is SizeOutcome.APPLIED else size.desired)
        self._record(decision, outcome, problem or reading.detail)

    async def _set(self, decision: Decision, size: PoolSize) -> tuple[SizeOutcome, str | None]:
        if decision.action is ScalingAction.HOLD:
            return SizeOutcome.UNCHANGED, None
        if self._dry_run:
            return SizeOutcome.DRY_RUN, None
        try:
            await self._pool.put(decision.desired, size.version)
        except Conflict:
            return SizeOutcome.CONFLICT, f"another writer changed the size after version {size.version}"
        except HypercoreError as error:
            self.condition.manager = error.message
            return SizeOutcome.FAILED, error.message
        return SizeOutcome.APPLIED, None

    def _record_unreadable_size(self, error: HypercoreError) -> None:
        self.condition.manager = error.message
        self._metrics.problems.labels(SignalProblem.UNREACHABLE).inc()
        now = self._tick()
        self._remember(
            ScalingDecision(
                at=now,
                until=now,
                times=1,
                action=ScalingAction.HOLD,
                reason=ScalingReason.NO_DATA,
                outcome=SizeOutcome.FAILED,
                wanted_before=None,
                desired=None,
                detail="the pool's size cannot be read",
                problem=error.message,
            )
        )

    def _record(self, decision: Decision, outcome: SizeOutcome, problem: str | None) -> None:
        metrics = self._metrics
        metrics.desired.set(decision.desired)
        for gauge, value in (
            (metrics.sessions, decision.sessions),
            (metrics.expected, decision.expected_sessions),
            (metrics.running, decision.running),
        ):
            gauge.set(float("nan") if value is None else value)
        fields = {name: getattr(decision, name) for name in Decision.__dataclass_fields__}
        self._remember(ScalingDecision(**fields, until=decision.at, times=1, outcome=outcome, problem=problem))

    def _remember(self, decision: ScalingDecision) -> None:
        self._metrics.decisions.labels(decision.action, decision.reason).inc()
        self._metrics.outcomes.labels(decision.outcome).inc()
        self._metrics.decided_at.set(decision.at)
        last = self._decisions[-1] if self._decisions else None
        if last is not None and _same(last, decision):
            self._decisions[-1] = decision.model_copy(update={"at": last.at, "times": last.times + 1})
            return
        self._decisions.append(decision)
        is_problem = decision.problem is not None and decision.outcome is not SizeOutcome.CONFLICT
        log = _log.warning if is_problem else _log.info
        log("autoscaler.decision", **decision.model_dump(exclude={"at", "until"}))

    def _tick(self) -> float:
        """Return the time; it never decreases, as the policy requires."""
        self._now = max(self._now, self._clock())
        return self._now


def _same(one: ScalingDecision, other: ScalingDecision) -> bool:
    """Return whether two consecutive decisions are equivalent: both keep the size, for the same kind of reason."""
    fields = ("action", "outcome", "desired", "wanted_before", "problem")
    alike = one.reason is other.reason or {one.reason, other.reason} <= _QUIET
    return one.action is ScalingAction.HOLD and alike and all(getattr(one, f) == getattr(other, f) for f in fields)
