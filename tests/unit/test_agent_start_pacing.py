"""Starts of Claude CLIs: their order, their number at a time, when one is given up, and when a turn is refused."""

import asyncio
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hypercore_agents.agent.claude.start_progress import Activity, StartProgress, activity_of
from hypercore_agents.agent.scheduling.fair_queue import FairQueue
from hypercore_agents.agent.scheduling.pace import Pace
from hypercore_agents.agent.scheduling.start_limiter import StartLimiter
from hypercore_agents.agent.sessions.capacity import LiveCapacity
from hypercore_agents.agent.sessions.cli_state import CliStatus
from hypercore_agents.api.errors import AtCapacity
from hypercore_agents.gateway.start_slots import StartSlots
from hypercore_agents.kit.aio.tasks import Tasks


async def test_a_user_with_many_waiting_turns_does_not_delay_another_user() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(3):
        queue.join("hog", f"hog {number}")
    assert (queue.ahead("hog"), queue.ahead("ada")) == (3, 1)
    queue.join("ada", "ada 0")
    served = [queue.take() for _ in range(4)]
    assert [entry[0] for entry in served if entry] == ["hog 0", "ada 0", "hog 1", "hog 2"]
    assert (len(queue), queue.take()) == (0, None)


async def test_cancelled_waiters_are_skipped() -> None:
    queue: FairQueue[str] = FairQueue()
    first = queue.join("ada", "first")
    queue.join("ada", "second")
    first.cancel()
    taken = queue.take()
    assert taken is not None
    assert taken[0] == "second"


def test_the_pace_shrinks_when_starts_starve_and_grows_again() -> None:
    pace = Pace(4)
    for _ in range(6):
        pace.record_start(0.1)
    assert pace.limit == 1
    for _ in range(20):
        pace.record_start(0.9)
    assert pace.limit == 4


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("cpu_per_second", "reads_per_second", "given_up_at"),
    [(0.0, 0, 30), (0.002, 0, 30), (0.02, 0, 600), (1.0, 0, 120), (0.0, 1, 600)],
    ids=["makes no progress", "only waits", "starved by its host", "spins", "reads from a slow disk"],
)
def test_a_start_without_progress_is_given_up(cpu_per_second: float, reads_per_second: int, given_up_at: int) -> None:
    clock = Clock()
    progress = StartProgress(30, clock)
    while progress.update(Activity(cpu_per_second * clock.now, int(reads_per_second * clock.now))) is None:
        clock.now += 1
    assert clock.now == given_up_at


def test_the_activity_of_a_start_includes_its_descendants() -> None:
    spins = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spins!r}])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        work = activity_of(process.pid)
        process.communicate(b"\n")
    assert work is not None
    assert work.cpu >= 0.3
    assert activity_of(process.pid) is None


async def run_tasks() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_starts_are_admitted_user_by_user() -> None:
    start_limiter, began = StartLimiter(1), list[str]()
    go = asyncio.Event()

    async def start(user_id: str) -> None:
        async with start_limiter.session_slot(user_id):
            began.append(user_id)
            await go.wait()

    tasks = [asyncio.create_task(start(user)) for user in ("hog", "hog", "hog", "ada")]
    await run_tasks()
    assert (began, start_limiter.waiting, start_limiter.count_by_user()) == (["hog"], 3, {"hog": 2, "ada": 1})
    go.set()
    await asyncio.gather(*tasks)
    assert began == ["hog", "hog", "ada", "hog"]


async def test_agents_share_the_hosts_start_slots_and_get_fewer_while_it_is_busy() -> None:
    runnable = 0
    slots = StartSlots(2, lambda: runnable)
    await slots.take("one", wait=True)
    await slots.take("one", wait=True)
    with pytest.raises(AtCapacity):
        await slots.take("two", wait=False)
    order = list[str]()

    async def take(agent: str) -> None:
        await slots.take(agent, wait=True)
        order.append(agent)

    waiting = [asyncio.create_task(take(agent)) for agent in ("one", "one", "two")]
    await run_tasks()
    waiting[0].cancel()
    for _ in range(2):
        await run_tasks()
        slots.release()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert order == ["one", "two"]
    runnable = 1000
    for _ in range(2):
        slots.release()
    assert slots.limit == 1
    runnable = 0
    for _ in range(8):
        await slots.take("one", wait=False)
        slots.release()
    assert slots.limit == 2


def waiting_session(user_id: str) -> Any:
    return SimpleNamespace(
        user_id=user_id,
        guard=asyncio.Lock(),
        status=CliStatus(),
        has_prewarmed=False,
        turn=object(),
        jobs=SimpleNamespace(running=False),
    )


async def test_a_turn_with_a_prewarmed_cli_is_not_refused_for_waiting_starts() -> None:
    start_limiter, tasks = StartLimiter(1), Tasks("test")
    capacity = LiveCapacity(
        8, timeout=1, sessions=lambda: (), tasks=tasks, on_parked=lambda: None, start_limiter=start_limiter
    )
    start_limiter.record_start(share=0.1, seconds=40.0)
    async with start_limiter.session_slot("bob"):
        session = waiting_session("ada")
        with pytest.raises(AtCapacity):
            await capacity.enter(session, seconds=30)
        session.has_prewarmed = True
        await capacity.enter(session, seconds=30)
    assert session.status.holds_slot
    await tasks.close()


async def test_only_a_turn_that_cannot_end_before_its_deadline_is_refused_at_once() -> None:
    sessions: list[Any] = []
    tasks = Tasks("test")
    start_limiter = StartLimiter(1)
    capacity = LiveCapacity(
        1, timeout=60, sessions=lambda: sessions, tasks=tasks, on_parked=lambda: None, start_limiter=start_limiter
    )  # fmt: skip
    for _ in range(3):
        capacity.record_turn(with_slot=4.0, with_cli=1.0)

    async def enter(user_id: str, seconds: float) -> None:
        session = waiting_session(user_id)
        sessions.append(session)
        await capacity.enter(cast(Any, session), seconds=seconds)

    await enter("hog", 30)
    held = [asyncio.create_task(enter("hog", 300)) for _ in range(8)]
    await run_tasks()
    assert capacity.waiting == 8
    with pytest.raises(AtCapacity, match="would wait about 36 s") as refused:
        await enter("hog", 30)
    assert refused.value.retry_after is not None
    assert 10 < refused.value.retry_after < 30
    victim = asyncio.create_task(enter("ada", 30))
    await run_tasks()
    assert not victim.done()
    for task in (*held, victim):
        task.cancel()
    await asyncio.gather(*held, victim, return_exceptions=True)
    await tasks.close()
