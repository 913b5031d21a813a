"""Spares: when the successor of one that was taken begins to start."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hypercore_agents.agent.connects import Connects
from hypercore_agents.agent.spares import Spare, Spares
from hypercore_agents.api.options import SessionOptions
from hypercore_agents.kit.tasks import Tasks


async def test_who_takes_a_spare_has_a_head_start_and_only_the_first_of_many_takers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []
    loop, timers = asyncio.get_running_loop(), list[Any]()

    async def start(self: Spares) -> None:
        process = SimpleNamespace(alive=True, pid=None)
        self._ready.append(Spare(SessionOptions(), cast(Any, None), cast(Any, process), cast(Any, None)))
        started.append("one")

    monkeypatch.setattr(Spares, "_start", start)
    monkeypatch.setattr(loop, "call_later", lambda seconds, call, *_: timers.append(call))
    tasks = Tasks("test")
    spares = Spares(cast(Any, SimpleNamespace(connects=Connects(1))), 2, lambda: 2, tasks)

    async def settled() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    await settled()
    assert (spares.count, len(started)) == (2, 2)
    assert spares.take(SessionOptions(), "ada") is not None
    assert spares.take(SessionOptions(), "ada") is not None
    await settled()
    assert (spares.count, len(timers)) == (0, 1)
    timers.pop()()
    await settled()
    assert spares.count == 2
    assert spares.take(SessionOptions(), "ada") is not None
    assert len(timers) == 1
    await tasks.close()
