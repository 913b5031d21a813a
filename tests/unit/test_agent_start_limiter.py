"""Places for starts: sessions in order, prewarmed CLIs only where there is calm."""

import asyncio

from hypercore_agents.agent.scheduling.start_limiter import StartLimiter


async def test_sessions_start_in_order_and_it_is_calm_when_the_last_has_started() -> None:
    start_limiter, calm, began = StartLimiter(1), asyncio.Event(), list[int]()
    start_limiter.on_calm = calm.set
    go = [asyncio.Event() for _ in range(3)]

    async def start(number: int) -> None:
        async with start_limiter.session("ada"):
            began.append(number)
            await go[number].wait()

    tasks = [asyncio.create_task(start(number)) for number in range(3)]
    assert start_limiter.calm
    while not began:
        await asyncio.sleep(0)
    tasks[1].cancel()  # who no longer waits leaves no trace
    go[0].set()
    await asyncio.wait(tasks[:2])
    while len(began) < 2:
        await asyncio.sleep(0)
    assert (began, start_limiter.calm, calm.is_set()) == ([0, 2], False, False)
    go[2].set()
    await tasks[2]
    assert (start_limiter.calm, calm.is_set()) == (True, True)
