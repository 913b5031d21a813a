"""Decisions of the autoscaling policy by example: size, reason and detail."""

from dataclasses import replace
from typing import Any

from hypercore_agents.api.pool import ScalingReason
from hypercore_agents.autoscaler.policy import Decision, Observation, PolicySettings, PolicyState, decide

POLICY = PolicySettings()


def decisions_on(
    loads: list[float], *, wanted: int, running: int | None = None, policy: PolicySettings = POLICY
) -> list[Decision]:
    """Return the decisions on a sequence of loads; agents start immediately unless `running` is given."""
    state, decisions = PolicyState(), []
    for step, load in enumerate(loads):
        seen = Observation(load, wanted if running is None else running)
        decision, state = decide(seen, wanted, policy, state, 1000 + step * policy.interval)
        wanted = decision.desired
        decisions.append(decision)
    return decisions


def test_above_the_upper_threshold_the_pool_is_sized_for_the_target() -> None:
    (decision,) = decisions_on([1610], wanted=20)
    assert (decision.desired, decision.reason) == (23, ScalingReason.LOAD)
    assert "1610" in decision.detail


def test_at_the_upper_threshold_the_size_is_unchanged() -> None:
    (decision,) = decisions_on([1600], wanted=20)
    assert (decision.desired, decision.reason) == (20, ScalingReason.STEADY)


def test_rising_trends_grow_the_pool_ahead_of_the_load() -> None:
    last = decisions_on([1000, 1100, 1200, 1300], wanted=20)[-1]
    # 20 sessions per second for 15 s (10 to start an agent, 5 until the next decision)
    assert last.expected_sessions == 1600
    grown = decisions_on([1000, 1100, 1200, 1300, 1400], wanted=20)[-1]
    assert (grown.desired, grown.reason) == (25, ScalingReason.TREND)


def test_noise_is_not_a_trend() -> None:
    zigzag = [1400.0, 1500.0] * 20
    assert {decision.desired for decision in decisions_on(zigzag, wanted=20)[4:]} == {20}


def test_a_full_pool_at_least_doubles() -> None:
    (decision,) = decisions_on([2000], wanted=20)
    assert (decision.desired, decision.reason) == (40, ScalingReason.PANIC)


def test_starting_agents_count_in_a_panic() -> None:
    (decision,) = decisions_on([2000], wanted=60, running=20)
    assert decision.desired == 60


def test_one_decision_grows_the_pool_by_at_most_a_fixed_factor() -> None:
    (decision,) = decisions_on([50_000], wanted=20, running=20)
    assert decision.desired == 80


def test_below_the_lower_threshold_the_short_window_applies() -> None:
    decisions = decisions_on([200.0] * 14, wanted=20)
    assert [decision.desired for decision in decisions[:12]] == [20] * 12
    assert decisions[11].reason is ScalingReason.STABILISING
    assert (decisions[12].desired, decisions[12].reason) == (10, ScalingReason.IDLE)


def test_between_the_thresholds_the_long_window_applies() -> None:
    decisions = decisions_on([1000.0] * 61, wanted=20)
    assert {decision.desired for decision in decisions[:60]} == {20}
    assert (decisions[60].desired, decisions[60].reason) == (15, ScalingReason.CONSOLIDATION)


def test_without_consolidation_the_pool_never_shrinks_between_thresholds() -> None:
    dead = replace(POLICY, consolidation_window=0)
    assert {decision.desired for decision in decisions_on([1000.0] * 200, wanted=20, policy=dead)} == {20}


def test_the_pool_stays_sized_for_the_highest_load_in_the_window() -> None:
    decisions = decisions_on([560.0] * 4 + [400.0] * 10, wanted=30)
    assert decisions[-1].desired == 10
    assert min(decision.desired for decision in decisions) >= 8
    decisions = decisions_on([890.0] * 4 + [700.0] * 9, wanted=30)
    assert decisions[12].desired == 13


def test_a_gap_in_the_data_restarts_the_window() -> None:
    state, wanted = PolicyState(), 20
    for now in (*range(0, 50, 5), *range(100, 155, 5)):
        decision, state = decide(Observation(200, 20), wanted, POLICY, state, now)
        assert decision.desired == 20
    decision, state = decide(Observation(200, 20), wanted, POLICY, state, 160)
    assert decision.desired == 10


def test_processor_and_memory_pressure_grow_the_pool() -> None:
    decision, _ = decide(Observation(100, 20, cpu=0.91), 20, POLICY, PolicyState(), 0)
    assert (decision.desired, decision.reason) == (26, ScalingReason.PRESSURE)
    decision, _ = decide(Observation(100, 20, memory=0.98, cpu=0.91), 20, POLICY, PolicyState(), 0)
    assert (decision.desired, decision.detail) == (28, "memory of the running agents is at 98%")


def test_queues_grow_the_pool_unless_the_api_limit_causes_them() -> None:
    seen = Observation(100, 20, queue_wait_seconds=6.0, api_headroom=0.8)
    assert decide(seen, 20, POLICY, PolicyState(), 0)[0].desired == 23
    assert decide(replace(seen, api_headroom=0.02), 20, POLICY, PolicyState(), 0)[0].desired == 20


def test_waiting_cli_starts_grow_the_pool_unless_the_host_is_saturated() -> None:
    waits: dict[str, Any] = {"sessions": 100, "running": 20, "start_wait_seconds": 12.0}
    decision, _ = decide(Observation(**waits), 20, PolicySettings(), PolicyState(), 0.0)
    assert (decision.desired, decision.reason) == (23, ScalingReason.PRESSURE)
    assert "starts of Claude CLIs wait 12.0 s for a processor" in decision.detail
    decision, _ = decide(Observation(**waits, cpu=0.9, host_load=4.0), 20, PolicySettings(), PolicyState(), 0.0)
    assert (decision.desired, decision.reason) == (20, ScalingReason.SATURATED)
    assert "the host is saturated (4.0 runnable processes per processor)" in decision.detail
    decision, _ = decide(Observation(**waits, memory=0.9, host_load=4.0), 20, PolicySettings(), PolicyState(), 0.0)
    assert (decision.desired, decision.reason) == (26, ScalingReason.PRESSURE), "memory is not the host's processors"


def test_repeated_pressure_grows_the_pool_only_after_a_pause() -> None:
    state, wanted, sizes = PolicyState(), 20, []
    for now in range(0, 125, 5):
        seen = Observation(600, wanted, queue_wait_seconds=6.0)
        decision, state = decide(seen, wanted, POLICY, state, now)
        wanted = decision.desired
        sizes.append(wanted)
    assert sizes == [23] * 12 + [27] * 12 + [31]


def test_sizes_above_the_maximum_are_reduced_to_it() -> None:
    decision, _ = decide(Observation(99_000, 1200), 1200, POLICY, PolicyState(), 0)
    assert (decision.desired, decision.reason) == (1000, ScalingReason.BOUNDS)


def test_decisions_report_when_a_bound_applies() -> None:
    decision, _ = decide(Observation(99_000, 1000), 1000, POLICY, PolicyState(), 0)
    assert (decision.desired, decision.reason) == (1000, ScalingReason.BOUNDS)
    decision, _ = decide(None, 3, POLICY, PolicyState(), 0)
    assert (decision.desired, decision.reason) == (10, ScalingReason.BOUNDS)


def test_incomplete_observations_grow_but_never_shrink_the_pool() -> None:
    state = PolicyState()
    for step in range(100):
        decision, state = decide(Observation(100, 20, complete=False), 20, POLICY, state, step * 5)
        assert decision.desired == 20
    assert decision.reason is ScalingReason.NO_DATA
    decision, _ = decide(Observation(1900, 20, complete=False), 20, POLICY, state, 500)
    assert decision.desired > 20
