"""Prewarmed CLIs: when the successor of a taken one starts."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hypercore_agents.agent.claude import prewarmed as module
from hypercore_agents.agent.claude.prewarmed import PrewarmedCli, PrewarmedClis
from hypercore_agents.agent.scheduling.start_limiter import StartLimiter
from hypercore_agents.api.errors import AtCapacity
from hypercore_agents.api.internal import AgentConfiguration
from hypercore_agents.api.options import SessionOptions
from hypercore_agents.kit.aio.tasks import Tasks


async def test_a_taken_clis_successor_starts_after_one_delay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []
    loop, timers = asyncio.get_running_loop(), list[Any]()

    async def start(self: PrewarmedClis) -> bool:
        process = SimpleNamespace(alive=True, pid=None)
        self._ready.append(PrewarmedCli(SessionOptions(), cast(Any, None), cast(Any, process), cast(Any, None)))
        started.append("one")
        return True

    monkeypatch.setattr(PrewarmedClis, "_start", start)
    monkeypatch.setattr(loop, "call_later", lambda seconds, call, *_: timers.append(call))
    tasks = Tasks("test")
    prewarmed = PrewarmedClis(cast(Any, SimpleNamespace(start_limiter=StartLimiter(1))), 2, lambda: 2, tasks)

    async def run_pending_tasks() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    await run_pending_tasks()
    assert (prewarmed.count, len(started)) == (2, 2)
    assert prewarmed.take(SessionOptions(), "ada") is not None
    assert prewarmed.take(SessionOptions(), "ada") is not None
    await run_pending_tasks()
    assert (prewarmed.count, len(timers)) == (0, 1)
    timers.pop()()
    await run_pending_tasks()
    assert prewarmed.count == 2
    assert prewarmed.take(SessionOptions(), "ada") is not None
    assert len(timers) == 1
    await tasks.close()


async def test_the_pause_after_a_failed_start_holds_no_start_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    held, paused = False, asyncio.get_running_loop().create_future()

    class Host:
        @contextlib.asynccontextmanager
        async def start_slot(self, *, wait: bool) -> AsyncIterator[bool]:
            nonlocal held
            held = True
            try:
                yield True
            finally:
                held = False

    async def refuse(*_: object, **__: object) -> None:
        raise AtCapacity("full")

    async def remove(_: object) -> None:
        return

    async def pause(seconds: float) -> None:
        paused.set_result(held)
        await asyncio.get_running_loop().create_future()

    isolation = SimpleNamespace(separate=True, folder=lambda _: None, remove=remove)
    configuration = AgentConfiguration(max_concurrent=1, tools=True)
    context = SimpleNamespace(start_limiter=StartLimiter(1, Host()), isolation=isolation, configuration=configuration)
    monkeypatch.setattr(module, "start", refuse)
    monkeypatch.setattr(module, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": pause}))
    tasks = Tasks("test")
    PrewarmedClis(cast(Any, context), 1, lambda: 1, tasks)
    assert await asyncio.wait_for(paused, 5) is False
    await tasks.close()
