"""Delayed calls: when they run, that most are cancelled, and that no timer runs without waiters."""

import asyncio
from collections.abc import Callable
from typing import cast

from hypercore_agents.kit.relay.delayed_calls import DelayedCalls


class Clock:
    """A loop's timers, by hand."""

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


def lasting_by(clock: Clock) -> DelayedCalls:
    return DelayedCalls(cast(asyncio.AbstractEventLoop, clock), 0.02)


def test_a_call_comes_after_one_moment_and_before_the_third_in_order() -> None:
    clock, came = Clock(), list[str]()
    lasting = lasting_by(clock)
    lasting.call(lambda: came.append("first"))
    lasting.call(lambda: came.append("second"))
    clock.tick()
    lasting.call(lambda: came.append("third"))
    assert came == []  # they may have been asked for right before this tick
    clock.tick()
    assert came == ["first", "second"]
    clock.tick()
    assert came == ["first", "second", "third"]


def test_what_is_over_in_time_is_not_called() -> None:
    clock, came = Clock(), list[str]()
    lasting = lasting_by(clock)
    short = lasting.call(lambda: came.append("short"))
    late = lasting.call(lambda: came.append("late"))
    lasting.call(lambda: came.append("long"))
    short.cancel()
    clock.tick()
    late.cancel()
    clock.tick()
    assert came == ["long"]
    short.cancel()  # safe to repeat, and after the call


def test_one_timer_for_all_and_none_while_nobody_waits() -> None:
    clock, came = Clock(), list[int]()
    lasting = lasting_by(clock)
    assert clock.timers == []
    for round_ in range(3):
        for number in range(100):
            lasting.call(lambda number=number: came.append(number))  # type: ignore[misc]
        assert len(clock.timers) == 1
        clock.tick()
        clock.tick()
        assert came == list(range(100)) * (round_ + 1)
        assert clock.timers == []


def test_a_call_may_ask_for_another() -> None:
    clock, came = Clock(), list[str]()
    lasting = lasting_by(clock)

    def again() -> None:
        came.append("again")
        if len(came) < 3:
            lasting.call(again)

    lasting.call(again)
    while clock.timers:
        clock.tick()
    assert came == ["again"] * 3


def test_nobody_is_called_after_the_end() -> None:
    clock, came = Clock(), list[str]()
    lasting = lasting_by(clock)
    lasting.call(lambda: came.append("older"))
    clock.tick()
    lasting.call(lambda: came.append("newer"))
    lasting.close()
    assert (clock.timers, came) == ([], [])
