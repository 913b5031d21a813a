"""Invariants of the autoscaling policy: monotone, bounded, no shrinking without data, no flapping."""

import itertools
import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from hypercore_agents.api.pool import ScalingAction, ScalingReason
from hypercore_agents.autoscaler.policy import Observation, PolicySettings, PolicyState, decide

START = 1_000_000.0
loads = st.floats(min_value=0, max_value=60_000, allow_nan=False)
shares = st.none() | st.floats(min_value=0, max_value=1.5)


@st.composite
def policies(draw: st.DrawFn) -> PolicySettings:
    target = draw(st.floats(0.5, 0.8))
    minimum = draw(st.integers(1, 20))
    return PolicySettings(
        minimum=minimum,
        maximum=draw(st.integers(minimum, 1000)),
        sessions_per_agent=draw(st.sampled_from([1, 10, 100])),
        target_utilisation=target,
        scale_up_threshold=draw(st.floats(target, 0.95)),
        scale_down_threshold=draw(st.floats(0.05, 0.45)),
        interval=draw(st.sampled_from([1.0, 5.0, 15.0])),
        stabilisation_window=draw(st.sampled_from([0.0, 30.0, 60.0])),
        consolidation_window=draw(st.sampled_from([0.0, 120.0, 300.0])),
    )


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    return Observation(
        sessions=draw(loads),
        running=draw(st.integers(0, 1000)),
        complete=draw(st.booleans()),
        age=draw(st.floats(0, 60)),
        spawn_seconds=draw(st.none() | st.floats(0, 300)),
        cpu=draw(shares),
        memory=draw(shares),
        queue_wait_seconds=draw(st.none() | st.floats(0, 100)),
        api_headroom=draw(st.none() | st.floats(0, 1)),
    )


@st.composite
def histories(draw: st.DrawFn, policy: PolicySettings) -> tuple[PolicyState, int, float]:
    """A state after some history, with the resulting size and the time of the next decision."""
    state, wanted, now = PolicyState(), draw(st.integers(0, 1200)), START
    for seen in draw(st.lists(st.none() | observations(), max_size=12)):
        decision, state = decide(seen, wanted, policy, state, now)
        wanted, now = decision.desired, now + policy.interval * draw(st.sampled_from([1, 1, 1, 2, 20]))
    return state, wanted, now


@settings(deadline=None)
@given(st.data())
def test_the_size_stays_within_bounds(data: st.DataObject) -> None:
    policy = data.draw(policies())
    state, wanted, now = data.draw(histories(policy))
    seen = data.draw(observations())
    decision, _ = decide(seen, wanted, policy, state, now)
    most = policy.maximum if seen.complete else max(policy.maximum, wanted)
    assert policy.minimum <= decision.desired <= most
    direction = (decision.desired > wanted) - (decision.desired < wanted)
    assert direction == {ScalingAction.GROW: 1, ScalingAction.HOLD: 0, ScalingAction.SHRINK: -1}[decision.action]


@settings(deadline=None)
@given(st.data())
def test_more_load_never_results_in_fewer_agents(data: st.DataObject) -> None:
    policy = data.draw(policies())
    state, wanted, now = data.draw(histories(policy))
    less = data.draw(observations())
    more = replace(less, sessions=less.sessions + data.draw(loads))
    smaller, larger = (decide(seen, wanted, policy, state, now)[0].desired for seen in (less, more))
    assert larger >= smaller


@settings(deadline=None)
@given(st.data(), st.lists(st.floats(0, 5000), min_size=2, max_size=30), st.floats(1, 8))
def test_a_scaled_up_load_history_never_results_in_fewer_agents(
    data: st.DataObject, load_history: list[float], factor: float
) -> None:
    policy = data.draw(policies())
    sizes = []
    for scale in (1.0, factor):
        state, size = PolicyState(), 0
        for step, load in enumerate(load_history):
            # enough running agents for every history: a full pool would hide the factor
            seen = Observation(load * scale, 1_000_000)
            decision, state = decide(seen, 50, policy, state, START + step * policy.interval)
            size = decision.desired
        sizes.append(size)
    assert sizes[1] >= sizes[0]


@settings(deadline=None)
@given(st.data())
def test_missing_data_never_shrinks_the_pool(data: st.DataObject) -> None:
    policy = data.draw(policies())
    state, wanted, now = data.draw(histories(policy))
    decision, after = decide(None, wanted, policy, state, now)
    assert decision.desired == max(wanted, policy.minimum)
    assert decision.reason in (ScalingReason.NO_DATA, ScalingReason.BOUNDS)
    assert after == state


@settings(deadline=None)
@given(st.data())
def test_incomplete_observations_never_shrink_the_pool(data: st.DataObject) -> None:
    policy = data.draw(policies())
    state, wanted, now = data.draw(histories(policy))
    seen = replace(data.draw(observations()), complete=False)
    assert decide(seen, wanted, policy, state, now)[0].desired >= wanted


@settings(deadline=None)
@given(st.data())
def test_the_pool_shrinks_only_after_a_window_without_a_gap(data: st.DataObject) -> None:
    policy = replace(data.draw(policies()), maximum=1000)
    load_history = data.draw(st.lists(st.none() | st.floats(0, 500), min_size=1, max_size=80))
    state, wanted, since, last = PolicyState(), 900, None, START
    for step, load in enumerate(load_history):
        now = START + step * policy.interval
        seen = None if load is None else Observation(load, 900)
        decision, state = decide(seen, wanted, policy, state, now)
        if load is not None:
            since = now if since is None or now - last > policy.longest_gap else since
            last = now
        if decision.action is ScalingAction.SHRINK:
            assert since is not None
            assert now - since >= min(policy.stabilisation_window, policy.consolidation_window or math.inf)
        wanted = decision.desired


@settings(max_examples=40, deadline=None)
@given(st.data(), loads)
def test_the_pool_size_converges_under_constant_load(data: st.DataObject, load: float) -> None:
    policy = data.draw(policies())
    state, wanted, now = data.draw(histories(policy))
    # agents start immediately, and a full pool reports at most its capacity
    sizes = []
    for _ in range(1000):
        seen = Observation(min(load, wanted * policy.sessions_per_agent), wanted)
        decision, state = decide(seen, wanted, policy, state, now)
        wanted, now = decision.desired, now + policy.interval
        sizes.append(wanted)
    settled = sizes[500:]
    assert len(set(settled)) == 1
    assert wanted == policy.maximum or load <= policy.scale_up_threshold * wanted * policy.sessions_per_agent
    changes = [b - a for a, b in itertools.pairwise(sizes) if a != b]
    reversals = sum(1 for a, b in itertools.pairwise(changes) if a * b < 0)
    assert reversals <= 2


@settings(deadline=None)
@given(st.data(), st.integers(0, 60_000))
def test_constant_load_never_changes_a_pool_sized_for_it(data: st.DataObject, load: int) -> None:
    policy = data.draw(policies())
    need = math.ceil(load / (policy.target_utilisation * policy.sessions_per_agent) - 1e-9)
    wanted = min(max(need, policy.minimum), policy.maximum)
    state, now = PolicyState(), START
    for _ in range(100):
        seen = Observation(min(load, wanted * policy.sessions_per_agent), wanted)
        decision, state = decide(seen, wanted, policy, state, now)
        assert decision.action is ScalingAction.HOLD
        now += policy.interval
