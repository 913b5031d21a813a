"""Idle sessions of the pool are unplaced, and are placed again when they are used."""

from pathlib import Path

from hypercore_agents.store import placement, sessions
from support.manager_server import deployed
from support.waiting import until


async def test_an_idle_session_is_unplaced_until_its_next_turn(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=1, max_concurrent_requests=2, place_ttl=1) as deployment:
        await deployment.warm(1)
        agent = deployment.agent
        _, kept = await deployment.chat()
        agent.keeps.add(kept["session_id"])
        _, idle = await deployment.chat()
        await until(lambda: agent.released == [idle["session_id"]])

        async def unplaced() -> bool:
            _, view = await deployment.call("GET", f"/v1/agent/session/{idle['session_id']}")
            return bool(view["agent_id"] is None and view["state"] == "parked")

        await until(unplaced)
        _, view = await deployment.call("GET", f"/v1/agent/session/{kept['session_id']}")
        assert view["agent_id"] == agent.agent_id, "a session stays placed while its agent holds unstored data"
        status, again = await deployment.chat("again", session_id=idle["session_id"])
        assert (status, again["turn"]) == (200, 2)
        assert agent.chats[-1]["placement"]["generation"] == 2


async def test_requests_for_files_place_an_unplaced_session(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=1, max_concurrent_requests=1, place_ttl=0) as deployment:
        await deployment.warm(1)
        agent = deployment.agent
        _, first = await deployment.chat("hello", user_id="ada")
        session_id = first["session_id"]
        files = f"/v1/agent/session/{session_id}/files"

        async def unplace() -> None:
            async with deployment.database.write() as connection:
                row = await sessions.get_session(connection, session_id)
                assert row is not None
                later = row.last_used_at + 1
                assert await placement.unplace_idle(connection, session_id, row.generation, before=later, now=later)

        async def put() -> int:
            octets = {"content-type": "application/octet-stream"}
            async with deployment.http.put(f"{deployment.url}{files}/a.txt", data=b"{}", headers=octets) as answer:
                return answer.status

        async def get(path: str) -> int:
            async with deployment.http.get(f"{deployment.url}{path}") as answer:
                return answer.status

        for number, reached in enumerate((lambda: get(files), lambda: get(f"{files}/a.txt"), put), 2):
            await unplace()
            assert await get(f"{files}?user_id=bob") == 404, "another user's request places nothing"
            assert await reached() == 200
            opened = agent.opened[-1]
            assert (opened["user_id"], opened["placement"]["session_id"]) == ("ada", session_id)
            assert (opened["placement"]["generation"], opened["placement"]["turn"]) == (number, 2)
        status, again = await deployment.chat("again", session_id=session_id, user_id="ada")
        assert (status, again["turn"]) == (200, 2)
        await unplace()
        assert (await deployment.chat("another's", user_id="bob"))[0] == 200
        status, refused = await deployment.call("GET", files)
        assert (status, refused["error"]["type"]) == (503, "at_capacity")


async def test_a_session_used_meanwhile_stays_placed(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=1, place_ttl=0) as deployment:
        await deployment.warm(1)
        _, first = await deployment.chat()
        async with deployment.database.write() as connection:
            row = await sessions.get_session(connection, first["session_id"])
            assert row is not None
            used = row.last_used_at
            assert not await placement.unplace_idle(connection, row.session_id, 1, before=used, now=used)
            assert not await placement.unplace_idle(connection, row.session_id, 2, before=used + 1, now=used)
            assert await placement.list_idle(connection, before=used, now=used, limit=9) == []
            assert await placement.unplace_idle(connection, row.session_id, 1, before=used + 1, now=used)
            assert await placement.list_idle(connection, before=used + 1, now=used, limit=9) == []
