"""Agents and managers retain no memory of ended sessions.

The tests count live objects of the platform and of asyncio by type, after a few sessions and after many more: an entry
that stays in a dictionary, a retained lock or a task that is never awaited shows as growth.
"""

import asyncio
import gc
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from hypercore_agents.api.chat import SessionOpening
from support.agent_server import served_agent, stand_in_gateway, turn
from support.descriptors import descriptor_count
from support.manager_server import deployed

FEW, MANY = 6, 24
SLACK = MANY // 5
"""Tolerated growth of a count; a leak adds at least one object per session."""


BOUNDED = (
    "hypercore_agents.kit.relay.connection_pool.Origin",  # a bounded cache of recent addresses
    "hypercore_agents.compute.testing.faults.Call",  # the bounded call log of the test backend, which grows with time
    "asyncio.events.TimerHandle",  # cancelled timers, until they would be due
)
"""Types whose number is bounded independently of sessions."""


def live_objects() -> Counter[str]:
    """Count objects of the platform and of asyncio by type, and descriptors."""
    gc.collect()
    names = (f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects())
    found = Counter(name for name in names if name.startswith(("hypercore_agents.", "asyncio.", "_asyncio.")))
    for name in BOUNDED:
        del found[name]
    found["descriptors"] = descriptor_count()
    return found


async def growth(session: Callable[[], Awaitable[None]]) -> dict[str, int]:
    """Return the growth between a few and many sessions, by type."""
    for _ in range(FEW):
        await session()
    await asyncio.sleep(0)
    before = live_objects()
    for _ in range(MANY):
        await session()
    await asyncio.sleep(0)
    after = live_objects()
    return {name: count - before[name] for name, count in after.items() if count - before[name] > SLACK}


async def test_agents_retain_nothing_of_deleted_sessions(tmp_path: Path) -> None:
    async with stand_in_gateway() as gateway, served_agent(gateway, tmp_path / "agent") as agent:
        sessions = agent.server.enrolled()
        retained = []

        async def session() -> None:
            body = turn("", approval_tools=["*"])
            opening = SessionOpening.model_validate({name: body[name] for name in ("user_id", "placement")})
            opened = sessions.open(opening)
            sessions.approvals.hooks(opened.session_id, opened.user_id, ["*"], lambda _: None)
            await sessions.delete(opened.session_id)

        assert await growth(session) == {}
        assert not list((tmp_path / "agent" / "sessions").glob("*"))

        async def leaking() -> None:
            retained.append(asyncio.Lock())

        assert await growth(leaking), "growth is detected"


async def test_managers_retain_nothing_of_deleted_sessions(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=1, rate_limit_per_minute=0, rate_limit_per_hour=0) as site:
        await site.warm(1)

        async def session() -> None:
            status, answer = await site.chat()
            assert status == 200
            status, _ = await site.chat(session_id=answer["session_id"], when_busy="queue")
            assert status == 200
            assert (await site.call("DELETE", f"/v1/agent/session/{answer['session_id']}"))[0] == 200
            for agent in site.agents.running.values():  # recorded by the stand-in
                for noted in (agent.chats, agent.headers, agent.deleted):
                    noted.clear()

        assert await growth(session) == {}
