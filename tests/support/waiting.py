"""Waiting for a condition with a deadline."""

import asyncio
import time
from collections.abc import Callable
from typing import Any


async def until(holds: Callable[[], Any], *, seconds: float = 30.0, pause: float = 0.01, what: str = "") -> Any:
    """Call `holds` until it returns a true value, and return that value. Fail the test after `seconds`.

    `holds` may be a coroutine function. `pause` is the time between two calls, in seconds; `what` names the condition
    in the failure.
    """
    deadline = time.monotonic() + seconds
    while True:
        value = holds()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"{what or 'the condition'} did not hold within {seconds:g} s")
        await asyncio.sleep(pause)
