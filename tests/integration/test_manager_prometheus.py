"""Service discovery: every running agent is a target that can be scraped at the given address and path."""

from pathlib import Path

from support.manager_server import deployed


async def test_every_running_agent_is_a_target_that_can_be_scraped(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=2, max_agents=2) as deployment:
        await deployment.warm(2)
        _, own = await deployment.call("POST", "/v1/agents/spawn", {"user_id": "ada"})
        status, groups = await deployment.call("GET", "/v1/prometheus/targets")
        assert status == 200
        assert {group["labels"]["instance"] for group in groups} == set(deployment.agents.running)
        kinds = {group["labels"]["instance"]: group["labels"]["kind"] for group in groups}
        assert sorted(kinds.values()) == ["dedicated", "pool", "pool"]
        assert kinds[own["agent_id"]] == "dedicated"
        for group in groups:
            (address,) = group["targets"]
            assert f"http://{address}" == deployment.url
            page = await deployment.call("GET", group["labels"]["__metrics_path__"])
            assert page == (200, "agent_active_sessions 0\n")

        await deployment.call("DELETE", "/v1/agents/delete", agent_id=own["agent_id"])
        _, groups = await deployment.call("GET", "/v1/prometheus/targets")
        assert own["agent_id"] not in {group["labels"]["instance"] for group in groups}
