"""The scaling policy: `decide` computes the size of the pool from its arguments alone, *now* included.

Growth. The policy estimates the load at the time when a new agent could serve: the present load plus the recent trend
over the lead time. Only the part of the trend that exceeds the noise of earlier samples counts. If this load fills more
than `scale_up_threshold` of the desired agents, the pool is sized for `target_utilisation`. A full pool hides further
demand, so a full pool (panic) is multiplied by at least `surge_factor`, and the trend from before it was full is
extrapolated for one more lead time.

Shrinking. The pool shrinks to the size for the highest smoothed load of a complete stabilisation window without gaps,
never within the panic window, and not before the short window after a growth has passed. Below `scale_down_threshold`
the short window applies, between the thresholds the long one (consolidation): a dead band from 0.30 to 0.80 would leave
a pool at less than half its utilisation permanently after a surge. `consolidation_window` 0 restores the dead band.

Invariants (tests/property/test_autoscaler_policy.py): the size is within [`minimum`, `maximum`]; a higher present load,
or a history scaled up by a factor, never yields a smaller size; without a complete observation the size never shrinks;
under constant load the size becomes constant.

Rejected: cooldown timers (they also delay urgent growth); prediction from daily patterns (a wrong prediction is worse
than none, and agents start in seconds); Kubernetes' ratio with a tolerance (figures in docs/adr/0010-autoscaling.md).
"""

import math
import statistics
from dataclasses import dataclass, replace

from hypercore_agents.api.pool import ScalingAction as Action
from hypercore_agents.api.pool import ScalingReason as Reason
from hypercore_agents.autoscaler.load_history import LEAST_TREND_SAMPLES, Sample, gapless, since_full, trend

_MOST_SAMPLES = 40_000
"""Enough for the longest window (an hour) at the shortest interval (0.1 s)."""


@dataclass(frozen=True)
class PolicySettings:
    """Settings of the policy. Times in seconds, sizes in agents, shares between 0 and 1."""

    minimum: int = 10
    maximum: int = 1000
    sessions_per_agent: int = 100
    scale_up_threshold: float = 0.80
    scale_down_threshold: float = 0.30
    target_utilisation: float = 0.70
    interval: float = 5.0
    spawn_seconds: float = 10.0
    """Assumed lead time until one is measured."""
    longest_lead: float = 120.0
    trend_window: float = 20.0
    panic_threshold: float = 0.95
    panic_window: float = 60.0
    surge_factor: float = 2.0
    most_growth: float = 4.0
    """One decision multiplies the larger of desired agents, running agents and 10 by at most this factor."""
    stabilisation_window: float = 60.0
    consolidation_window: float = 300.0
    least_consolidation: float = 0.05
    """Minimum share of the pool that consolidation removes; smaller changes would be reversed by normal fluctuation."""
    longest_gap: float = 30.0
    """After a gap longer than this between observations, all windows start again."""
    pressure_threshold: float = 0.85
    """Utilisation of CPU or memory, averaged over the pool's agents, that counts as pressure."""
    longest_queue_wait: float = 2.0
    """Wait of turns in agents' queues (95th percentile, seconds) that counts as pressure."""
    longest_start_wait: float = 5.0
    """Wait of CLI starts for a processor (95th percentile, seconds) that counts as pressure."""
    host_saturation: float = 1.5
    """Runnable processes per processor of a single host above which more agents on that host do not help."""
    least_api_headroom: float = 0.10
    """Below this remaining share of the Claude API's rate limit, queues do not count as pressure."""


@dataclass(frozen=True)
class Observation:
    """Measured state of the pool. None means unknown."""

    sessions: float
    """Sessions placed on the pool's agents."""
    running: int
    """Running agents of the pool."""
    complete: bool = True
    """False if some agents did not report, so that `sessions` is a lower bound."""
    age: float = 0.0
    """Age of the data in seconds."""
    spawn_seconds: float | None = None
    cpu: float | None = None
    memory: float | None = None
    queue_wait_seconds: float | None = None
    start_wait_seconds: float | None = None
    host_load: float | None = None
    """Runnable processes per processor, where all agents share one host; None elsewhere."""
    api_headroom: float | None = None


@dataclass(frozen=True)
class PolicyState:
    """State of `decide` between calls. Its loss only delays shrinking."""

    samples: tuple[Sample, ...] = ()
    trend: float = 0.0
    """Sessions per second, from the last samples in which the pool was not full."""
    trend_at: float = 0.0
    panic_at: float | None = None
    grown_at: float | None = None


@dataclass(frozen=True)
class Decision:
    """The new size of the pool, and the reason."""

    at: float
    action: Action
    desired: int
    wanted_before: int
    reason: Reason
    detail: str
    sessions: float | None = None
    expected_sessions: float | None = None
    running: int | None = None


def decide(
    seen: Observation | None, current: int, settings: PolicySettings, state: PolicyState, now: float
) -> tuple[Decision, PolicyState]:
    """Return the pool's next size and the state for the next call.

    `current` is the pool's desired size so far. `seen` is None if there is no trustworthy data. `now` is in seconds and
    never decreases.
    """
    if seen is None:
        bounded = _bounded(current, settings)
        if bounded > current:
            return _decision(bounded, current, Reason.BOUNDS, f"the minimum is {settings.minimum}", now), state
        return _decision(current, current, Reason.NO_DATA, "no trustworthy data: the size does not change", now), state
    state = _remember(seen, settings, state, now)
    expected = _expected(seen, settings, state, now)
    needed, reason, detail = _needed(seen, expected, current, settings)
    pressed, why, saturated = _pressure(seen, settings)
    if _just_grew(state, settings, now):
        pressed = min(pressed, current)  # existing sessions do not move, so new agents relieve pressure slowly
    if pressed > needed:
        needed, reason, detail = pressed, Reason.PRESSURE, why
    if needed > current:
        desired = min(needed, _most(seen, current, settings))
    else:
        desired, reason, detail = _shrunk(needed, seen, current, settings, state, now)
    if saturated:
        reason = Reason.SATURATED if desired == current else reason
        detail = f"{detail}; {saturated}"
    bounded = _bounded(desired, settings)
    if bounded != desired:
        detail = f"{detail}; the bounds are {settings.minimum} to {settings.maximum}"
        reason = reason if (bounded - current) * (desired - current) > 0 else Reason.BOUNDS
    if bounded < current and not seen.complete:
        bounded, reason, detail = current, Reason.NO_DATA, "some agents did not report: the size does not shrink"
    decision = _decision(bounded, current, reason, detail, now)
    if decision.action is Action.GROW:
        state = replace(state, grown_at=now)
    return replace(decision, sessions=seen.sessions, expected_sessions=expected, running=seen.running), state


def _remember(seen: Observation, settings: PolicySettings, state: PolicyState, now: float) -> PolicyState:
    full = seen.sessions >= settings.panic_threshold * seen.running * settings.sessions_per_agent > 0
    keep_after = now - max(settings.consolidation_window, settings.stabilisation_window) - 2 * settings.longest_gap
    retained = tuple(sample for sample in state.samples[-_MOST_SAMPLES:] if sample.at >= keep_after)
    recent = [sample.load for sample in retained if sample.at > now - settings.trend_window]
    level = statistics.fmean([*recent, seen.sessions])
    state = replace(state, samples=(*retained, Sample(now, seen.sessions, level, full)))
    if full:
        state = replace(state, panic_at=now)
    usable = since_full(state.samples)
    if len(usable) < LEAST_TREND_SAMPLES:
        return state
    return replace(state, trend=trend(usable, settings.trend_window, now), trend_at=now)


def _expected(seen: Observation, settings: PolicySettings, state: PolicyState, now: float) -> float:
    """Return the expected sessions at the time when an agent that starts now can serve."""
    spawn = seen.spawn_seconds if seen.spawn_seconds is not None else settings.spawn_seconds
    lead = min(max(0.0, spawn) + settings.interval + max(0.0, seen.age), settings.longest_lead)
    unseen = now - state.trend_at
    if unseen > settings.panic_window + lead:
        return seen.sessions
    return seen.sessions + state.trend * (lead + min(unseen, lead))


def _needed(seen: Observation, expected: float, current: int, settings: PolicySettings) -> tuple[int, Reason, str]:
    """Return the size that the load requires, and the dominant reason."""
    reason, load = (Reason.TREND, expected) if expected > seen.sessions else (Reason.LOAD, seen.sessions)
    needed = _size_for(load, settings)
    detail = f"{load:.0f} sessions expected, {seen.sessions:.0f} now, on {current} agents"
    if needed > current and load <= settings.scale_up_threshold * current * settings.sessions_per_agent:
        needed = current
    if seen.sessions >= settings.panic_threshold * seen.running * settings.sessions_per_agent > 0:
        surge = _whole(settings.surge_factor * seen.running)
        if surge > max(needed, current):
            needed, reason = surge, Reason.PANIC
            detail = f"{seen.running} running agents are full with {seen.sessions:.0f} sessions"
    return needed, reason, detail


def _pressure(seen: Observation, settings: PolicySettings) -> tuple[int, str, str]:
    """Return the size that CPU, memory or queues require (0 for no requirement), its reason, and the pressure that more
    agents cannot relieve: on a single host with saturated processors they would only share them."""
    required = []
    if seen.memory is not None and seen.memory > settings.pressure_threshold:
        required.append(
            (_size_at(seen.memory, seen, settings), f"memory of the running agents is at {seen.memory:.0%}")
        )
    for_processors = _processors_wanted(seen, settings)
    saturated = ""
    if seen.host_load is not None and seen.host_load > settings.host_saturation:
        if for_processors:
            saturated = (
                f"{for_processors[0][1]}, and the host is saturated ({seen.host_load:.1f} runnable processes per "
                "processor): more agents on this host do not help, another host does"
            )
    else:
        required += for_processors
    size, why = max(required, default=(0, ""), key=lambda one: one[0])
    return size, why, saturated


def _processors_wanted(seen: Observation, settings: PolicySettings) -> list[tuple[int, str]]:
    """Return the sizes that a lack of processors requires, each with its evidence."""
    required = []
    if seen.cpu is not None and seen.cpu > settings.pressure_threshold:
        required.append((_size_at(seen.cpu, seen, settings), f"CPU of the running agents is at {seen.cpu:.0%}"))
    throttled = seen.api_headroom is not None and seen.api_headroom < settings.least_api_headroom
    some_more = _size_at(settings.scale_up_threshold, seen, settings)
    waited = seen.queue_wait_seconds
    if waited is not None and waited > settings.longest_queue_wait and not throttled:
        required.append((some_more, f"turns wait {waited:.1f} s for a Claude CLI process"))
    waited = seen.start_wait_seconds
    if waited is not None and waited > settings.longest_start_wait:
        required.append((some_more, f"starts of Claude CLIs wait {waited:.1f} s for a processor"))
    return required


def _size_at(share: float, seen: Observation, settings: PolicySettings) -> int:
    return _whole(seen.running * share / settings.target_utilisation)


def _shrunk(
    needed: int, seen: Observation, current: int, settings: PolicySettings, state: PolicyState, now: float
) -> tuple[int, Reason, str]:
    """Return the size after the shrinking that the windows allow."""
    load = seen.sessions
    usage = load / (current * settings.sessions_per_agent) if current else 0.0
    idle = usage < settings.scale_down_threshold
    steady = (current, Reason.STEADY, f"{load:.0f} sessions fill {usage:.0%} of {current} agents")
    window = settings.stabilisation_window if idle else settings.consolidation_window
    if needed >= current or (not idle and window <= 0):
        return steady
    target = max(needed, _size_for(load, settings))
    wait = (
        current,
        Reason.STABILISING,
        f"{current} agents, {target} needed; shrinks after {window:.0f} s of low load",
    )
    if state.panic_at is not None and now - state.panic_at < settings.panic_window:
        return wait
    if _just_grew(state, settings, now):
        return wait
    observed = gapless(state.samples, settings.longest_gap)
    if now - observed[0].at < window:
        return wait
    peak = max(sample.level for sample in observed if sample.at >= now - window)
    target = max(target, _size_for(peak, settings))
    if not idle and current - target < settings.least_consolidation * current:
        return steady
    if target >= current:
        return wait if _size_for(load, settings) < current else steady
    reason = Reason.IDLE if idle else Reason.CONSOLIDATION
    return target, reason, f"at most {peak:.0f} sessions in {window:.0f} s, on {current} agents"


def _just_grew(state: PolicyState, settings: PolicySettings, now: float) -> bool:
    return state.grown_at is not None and now - state.grown_at < settings.stabilisation_window


def _size_for(load: float, settings: PolicySettings) -> int:
    return _whole(load / (settings.target_utilisation * settings.sessions_per_agent))


def _whole(agents: float) -> int:
    # the small tolerance prevents that 70 sessions at 0.70 of 100 become two agents by rounding
    return math.ceil(agents - 1e-9)


def _most(seen: Observation, current: int, settings: PolicySettings) -> int:
    return _whole(settings.most_growth * max(current, seen.running, 10))


def _bounded(size: int, settings: PolicySettings) -> int:
    return min(max(size, settings.minimum), settings.maximum)


def _decision(desired: int, current: int, reason: Reason, detail: str, now: float) -> Decision:
    action = Action.GROW if desired > current else Action.SHRINK if desired < current else Action.HOLD
    return Decision(now, action, desired, current, reason, detail)
