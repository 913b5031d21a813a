"""Sessions of the pool that nobody uses give their places back, and come back when they are used again."""

from pathlib import Path

from hypercore_agents.store import sessions
from manager_sides import deployed, until


async def test_an_idle_session_gives_its_place_back_and_is_placed_anew(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=1, max_concurrent_requests=2, place_ttl=1) as deployment:
        await deployment.warm(1)
        (agent,) = deployment.agents.running.values()
        _, kept = await deployment.chat()
        agent.keeps.add(kept["session_id"])
        _, idle = await deployment.chat()
        await until(lambda: agent.released == [idle["session_id"]])

        async def unplaced() -> bool:
            _, view = await deployment.call("GET", f"/v1/agent/session/{idle['session_id']}")
            return bool(view["agent_id"] is None and view["state"] == "parked")

        await until(unplaced)
        _, view = await deployment.call("GET", f"/v1/agent/session/{kept['session_id']}")
        assert view["agent_id"] == agent.agent_id, "an agent that holds what nobody else has keeps its session"
        status, again = await deployment.chat("again", session_id=idle["session_id"])
        assert (status, again["turn"]) == (200, 2)
        assert agent.chats[-1]["placement"]["generation"] == 2


async def test_a_session_that_was_used_meanwhile_keeps_its_place(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=1, place_ttl=0) as deployment:
        await deployment.warm(1)
        _, first = await deployment.chat()
        async with deployment.database.write() as connection:
            row = await sessions.get_session(connection, first["session_id"])
            assert row is not None
            used = row.last_used_at
            assert not await sessions.unplace_idle(connection, row.session_id, 1, before=used, now=used)
            assert not await sessions.unplace_idle(connection, row.session_id, 2, before=used + 1, now=used)
            assert await sessions.list_idle(connection, before=used, now=used, limit=9) == []
            assert await sessions.unplace_idle(connection, row.session_id, 1, before=used + 1, now=used)
            assert await sessions.list_idle(connection, before=used + 1, now=used, limit=9) == []
