"""Tasks are supervised. The work queue removes duplicates, handles a key once at a time, and backs off."""

import asyncio

import pytest
from structlog.testing import capture_logs

from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.kit.aio.workqueue import WorkQueue
from support.waiting import until


async def test_a_failed_task_is_logged_by_name() -> None:
    tasks = Tasks("owner")

    async def fail() -> None:
        raise ValueError("why")

    with capture_logs() as logs:
        task = tasks.start("job", fail())
        await until(task.done)
        await until(lambda: bool(logs))
    assert logs[0]["task"] == "owner.job"
    await tasks.close()


async def test_close_cancels_tasks_and_refuses_new_ones() -> None:
    tasks = Tasks("owner")
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("cleaned up")

    tasks.start("job", work())
    await asyncio.sleep(0)
    await tasks.close()
    assert ended == ["cleaned up"]
    with pytest.raises(RuntimeError, match="closed"):
        tasks.start("late", work())


async def test_a_repeated_task_survives_a_failed_iteration() -> None:
    tasks = Tasks("owner")
    calls = 0

    async def iteration() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ValueError("once")

    with capture_logs():
        tasks.repeat("loop", iteration, every=0)
        await until(lambda: calls >= 3)
    await tasks.close()


async def test_a_key_is_handled_once_at_a_time_and_again_if_added_meanwhile() -> None:
    running = 0
    most = 0
    runs = 0
    release = asyncio.Event()

    async def handler(key: str) -> None:
        nonlocal running, most, runs
        running += 1
        most = max(most, running)
        runs += 1
        await release.wait()
        running -= 1

    queue = WorkQueue("test", handler, workers=4)
    queue.start()
    for _ in range(5):
        queue.add("a")
    await until(lambda: running == 1)
    queue.add("a")
    queue.add("a")
    assert queue.depth() == 1
    release.set()
    await until(lambda: runs == 2 and queue.depth() == 0)
    assert most == 1
    await queue.close()


async def test_failed_keys_are_retried_and_others_continue() -> None:
    seen: list[str] = []

    async def handler(key: str) -> None:
        seen.append(key)
        if key == "bad" and seen.count("bad") < 3:
            raise ValueError("not yet")

    queue = WorkQueue("test", handler, workers=1, first_pause=0.001, last_pause=0.002)
    queue.start()
    with capture_logs():
        queue.add("bad")
        queue.add("good")
        await until(lambda: seen.count("bad") == 3)
    assert "good" in seen
    await queue.close()


async def test_a_handler_can_reschedule_its_key() -> None:
    seen: list[str] = []

    async def handler(key: str) -> float | None:
        seen.append(key)
        return 0.001 if len(seen) < 3 else None

    queue = WorkQueue("test", handler)
    queue.start()
    queue.add("a")
    await until(lambda: len(seen) == 3)
    await queue.close()
