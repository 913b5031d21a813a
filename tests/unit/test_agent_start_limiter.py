"""The start limiter: sessions start in order, and prewarmed CLIs only while it is idle."""

import asyncio

from hypercore_agents.agent.scheduling.start_limiter import StartLimiter


async def test_sessions_start_in_order_and_the_limiter_is_idle_after_the_last() -> None:
    start_limiter, idle, began = StartLimiter(1), asyncio.Event(), list[int]()
    start_limiter.on_idle = idle.set
    go = [asyncio.Event() for _ in range(3)]

    async def start(number: int) -> None:
        async with start_limiter.session_slot("ada"):
            began.append(number)
            await go[number].wait()

    tasks = [asyncio.create_task(start(number)) for number in range(3)]
    assert start_limiter.idle
    while not began:
        await asyncio.sleep(0)
    tasks[1].cancel()  # a cancelled waiter leaves the queue
    go[0].set()
    await asyncio.wait(tasks[:2])
    while len(began) < 2:
        await asyncio.sleep(0)
    assert (began, start_limiter.idle, idle.is_set()) == ([0, 2], False, False)
    go[2].set()
    await tasks[2]
    assert (start_limiter.idle, idle.is_set()) == (True, True)
