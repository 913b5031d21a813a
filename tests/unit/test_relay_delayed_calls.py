"""Delayed calls: when they run, cancellation, and that no timer runs without calls."""

import asyncio
from collections.abc import Callable
from typing import cast

from hypercore_agents.kit.relay.delayed_calls import DelayedCalls


class Clock:
    """The timers of an event loop, advanced by hand."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, seconds: float, back: Callable[[], None]) -> "Clock":
        self.timers.append((seconds, back))
        return self

    def cancel(self) -> None:
        self.timers.clear()

    def tick(self) -> None:
        """Let the one timer come."""
        ((seconds, back),) = self.timers
        assert seconds == 0.02
        self.timers.clear()
        back()


def calls_by(clock: Clock) -> DelayedCalls:
    return DelayedCalls(cast(asyncio.AbstractEventLoop, clock), 0.02)


def test_calls_run_after_one_to_two_delays_in_order() -> None:
    clock, ran = Clock(), list[str]()
    delayed_calls = calls_by(clock)
    delayed_calls.call(lambda: ran.append("first"))
    delayed_calls.call(lambda: ran.append("second"))
    clock.tick()
    delayed_calls.call(lambda: ran.append("third"))
    assert ran == []  # they may have been requested right before this tick
    clock.tick()
    assert ran == ["first", "second"]
    clock.tick()
    assert ran == ["first", "second", "third"]


def test_cancelled_calls_do_not_run() -> None:
    clock, ran = Clock(), list[str]()
    delayed_calls = calls_by(clock)
    short = delayed_calls.call(lambda: ran.append("short"))
    late = delayed_calls.call(lambda: ran.append("late"))
    delayed_calls.call(lambda: ran.append("long"))
    short.cancel()
    clock.tick()
    late.cancel()
    clock.tick()
    assert ran == ["long"]
    short.cancel()  # safe to repeat, and after the call


def test_one_timer_serves_all_calls_and_none_runs_without_calls() -> None:
    clock, ran = Clock(), list[int]()
    delayed_calls = calls_by(clock)
    assert clock.timers == []
    for round_ in range(3):
        for number in range(100):
            delayed_calls.call(lambda number=number: ran.append(number))  # type: ignore[misc]
        assert len(clock.timers) == 1
        clock.tick()
        clock.tick()
        assert ran == list(range(100)) * (round_ + 1)
        assert clock.timers == []


def test_a_call_can_request_another() -> None:
    clock, ran = Clock(), list[str]()
    delayed_calls = calls_by(clock)

    def again() -> None:
        ran.append("again")
        if len(ran) < 3:
            delayed_calls.call(again)

    delayed_calls.call(again)
    while clock.timers:
        clock.tick()
    assert ran == ["again"] * 3


def test_no_call_runs_after_close() -> None:
    clock, ran = Clock(), list[str]()
    delayed_calls = calls_by(clock)
    delayed_calls.call(lambda: ran.append("older"))
    clock.tick()
    delayed_calls.call(lambda: ran.append("newer"))
    delayed_calls.close()
    assert (clock.timers, ran) == ([], [])
