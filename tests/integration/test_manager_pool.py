"""The pool's size over HTTP: compare-and-set, bounds, and agents that follow it."""

from pathlib import Path

from support.manager_server import deployed
from support.waiting import until


async def test_the_pool_follows_a_size_set_by_compare_and_set(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=1, max_agents=3) as deployment:
        await deployment.warm(1)
        assert (await deployment.call("GET", "/v1/pool"))[1] == {
            "desired": 1,
            "version": 0,
            "running": 1,
            "starting": 0,
            "draining": 0,
            "roll": None,
        }
        status, size = await deployment.call("PUT", "/v1/pool", {"desired": 3, "version": 0})
        assert (status, size) == (200, {"desired": 3, "version": 1})
        await deployment.warm(3)

        status, body = await deployment.call("PUT", "/v1/pool", {"desired": 2, "version": 0})
        assert (status, body["error"]["type"]) == (409, "conflict")
        assert body["error"]["details"] == {"desired": 3, "version": 1}

        status, size = await deployment.call("PUT", "/v1/pool", {"desired": 1, "version": 1})
        assert (status, size) == (200, {"desired": 1, "version": 2})

        async def shrunk() -> bool:
            pool = (await deployment.stats())["pool"]
            return bool(pool["running"] == 1 and pool["draining"] == 0)

        await until(shrunk)


async def test_a_size_out_of_range_is_refused_by_name(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=1, max_agents=3) as deployment:
        for desired in (0, 4):
            status, body = await deployment.call("PUT", "/v1/pool", {"desired": desired, "version": 0})
            assert (status, body["error"]["details"]["field"]) == (400, "desired")
            assert "MIN_AGENTS=1" in body["error"]["message"]
