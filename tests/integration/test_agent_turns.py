"""Turns through the real agent server, the real Agent SDK and the real Claude CLI, against the simulator."""

import asyncio
import functools
import os
import signal
from pathlib import Path
from typing import Any

from hypercore_agents.agent.isolation.processes import session_processes
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.api.ids import new_session_id
from hypercore_agents.api.internal import AgentConfiguration
from support.agent_server import Agent, Frame, StandInGateway, frames, served_agent, tool, turn
from support.simulator_fixtures import RunningSimulator
from support.waiting import until


async def test_turns_share_history_and_the_answer_has_the_ledgers_usage(
    agent: Agent, simulator: RunningSimulator
) -> None:
    first = turn("remember the word cobalt", system_prompt="You are terse.")
    session_id = first["session_id"]
    answer = await agent.chat(first)
    assert answer["session_id"] == session_id
    assert answer["agent_id"] == agent.server.settings.agent_id
    assert (answer["status"], answer["turn"], answer["tools"]) == ("completed", 1, True)
    assert answer["usage"]["cost_usd"] == 0.25
    assert answer["usage"]["output_tokens"] > 0
    second = await agent.chat(turn("[[recall 1]]", session_id, number=2, system_prompt="You are terse."))
    assert "cobalt" in second["content"]
    third = await agent.chat(turn("[[recall system]]", session_id, number=3, system_prompt="You are terse."))
    assert "You are terse." in third["content"]
    assert len(simulator.requests(session_id)) == 3


async def test_prompts_that_look_like_commands_or_files_reach_the_model_unchanged(
    agent: Agent, simulator: RunningSimulator
) -> None:
    session_id = new_session_id()
    megabyte = "word " * 200_000 + "end"
    for number, prompt in enumerate(("/compact now", "@/etc/passwd says what?", "/help", "-v", megabyte), start=1):
        await agent.chat(turn(prompt, session_id, number=number))
        last = simulator.requests(session_id)[-1]["body"]["messages"][-1]["content"]
        texts = [last] if isinstance(last, str) else [block["text"] for block in last if block["type"] == "text"]
        assert texts[-1] == prompt


async def test_deltas_are_streamed_between_session_and_result_while_the_turn_runs(agent: Agent) -> None:
    body = turn("[[tokens 40]] [[rate 40]]", stream=True)
    seen: list[Frame] = []
    async with agent.client.post(f"{agent.url}/v1/agent/chat", json=body, headers=agent.headers) as answer:
        assert answer.status == 200
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        async for frame in frames(answer):
            if not any(earlier.event == "delta" for earlier in seen) and frame.event == "delta":
                status, session = await agent.get(f"/v1/agent/session/{body['session_id']}")
                assert (status, session["running"]) == (200, True)
            seen.append(frame)
    names = [frame.event for frame in seen]
    assert names[0] == "session"
    assert names[-1] == "result"
    assert set(names[1:-1]) == {"delta"}
    assert "".join(frame.data["text"] for frame in seen[1:-1]) == seen[-1].data["content"]
    assert [frame.id for frame in seen] == [f"1.{number}" for number in range(1, len(seen) + 1)]


async def test_a_tool_writes_in_the_workspace_and_nowhere_else(agent: Agent, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    prompt = tool("Write", file_path="note.txt", content="hello") + tool("Write", file_path=str(outside), content="x")
    body = turn(prompt, stream=True)
    async with agent.client.post(f"{agent.url}/v1/agent/chat", json=body, headers=agent.headers) as answer:
        seen = [frame async for frame in frames(answer)]
    folder = SessionFolder.of(agent.state, body["session_id"])
    assert (folder.workspace / "note.txt").read_text() == "hello"
    assert not outside.exists()
    calls = [frame.data for frame in seen if frame.event == "tool_use"]
    results = [frame.data for frame in seen if frame.event == "tool_result"]
    assert [call["name"] for call in calls] == ["Write", "Write"]
    assert [result["is_error"] for result in results] == [False, True]
    assert [result["tool_use_id"] for result in results] == [call["tool_use_id"] for call in calls]
    assert seen[-1].data["status"] == "completed"


async def test_permission_modes_and_tool_lists_are_obeyed(agent: Agent) -> None:
    write = tool("Write", file_path="note.txt", content="x")
    cases: dict[str, tuple[dict[str, Any], bool]] = {
        "edits are accepted": ({"permission_mode": "acceptEdits"}, True),
        "the default mode denies, since it cannot ask": ({"permission_mode": "default"}, False),
        "nothing is allowed": ({"permission_mode": "dontAsk", "allowed_tools": []}, False),
        "not allowed": ({"disallowed_tools": ["Write"]}, False),
        "not offered": ({"tools": ["Read"]}, False),
        "offered": ({"tools": ["Write"]}, True),
    }
    for name, (options, expected) in cases.items():
        body = turn(write, **options)
        await agent.chat(body)
        folder = SessionFolder.of(agent.state, body["session_id"])
        assert (folder.workspace / "note.txt").exists() is expected, name
        await agent.delete(f"/v1/agent/session/{body['session_id']}")


async def test_disabled_tools_are_not_offered_and_the_answer_says_so(
    gateway: StandInGateway, simulator: RunningSimulator, tmp_path: Path
) -> None:
    gateway.configuration.tools = False
    gateway.configuration.tools_reason = "sessions are not isolated here"
    async with served_agent(gateway, tmp_path / "agent") as agent:
        answer = await agent.chat(turn("hello", tools=["Bash"]))
        assert answer["tools"] is False
        assert answer["notices"] == [
            "tools are off on this agent: sessions are not isolated here",
            "requested but not available: Bash",
        ]
        assert simulator.requests()[-1]["body"]["tools"] == []


async def test_max_turns_and_a_refusal_are_statuses(agent: Agent) -> None:
    body = turn(tool("Bash", command="echo one") + tool("Bash", command="echo two"), max_turns=1)
    assert (await agent.chat(body))["status"] == "max_turns"
    again = await agent.chat(turn("still there", body["session_id"], number=2, max_turns=1))
    assert again["status"] == "completed"
    assert (await agent.chat(turn("[[stop refusal]]")))["status"] == "refused"


async def test_a_client_that_disconnects_stops_its_turn_but_not_the_session(
    agent: Agent, simulator: RunningSimulator
) -> None:
    for stream in (True, False):
        body = turn("[[tokens 500]] [[rate 20]]", stream=stream)
        session_id = body["session_id"]
        if stream:
            async with agent.client.post(f"{agent.url}/v1/agent/chat", json=body, headers=agent.headers) as answer:
                async for frame in frames(answer):
                    if frame.event == "delta":
                        break
                answer.close()
        else:
            request = asyncio.create_task(agent.post("/v1/agent/chat", body))
            await until(functools.partial(simulator.requests, session_id))
            request.cancel()
        await until(lambda: agent.server.enrolled().get(session_id).turn is None, seconds=3)  # noqa: B023 (awaited at once)
        await until(lambda: simulator.stats()["open_streams"] == 0, seconds=3)
        pid = agent.cli_pid(session_id)
        assert (await agent.chat(turn("[[say here]]", session_id, number=2)))["content"] == "here"
        assert agent.cli_pid(session_id) == pid


async def test_an_interrupt_ends_the_turn_with_the_text_so_far(agent: Agent) -> None:
    body = turn("[[tokens 500]] [[rate 20]]", stream=True)
    seen = []
    async with agent.client.post(f"{agent.url}/v1/agent/chat", json=body, headers=agent.headers) as answer:
        async for frame in frames(answer):
            seen.append(frame)
            if [earlier.event for earlier in seen].count("delta") == 3 and frame.event == "delta":
                status, reply = await agent.post(f"/v1/agent/session/{body['session_id']}/interrupt")
                assert (status, reply["interrupted"]) == (200, True)
    assert seen[-1].event == "result"
    assert seen[-1].data["status"] == "interrupted"
    assert seen[-1].data["content"] == "".join(frame.data["text"] for frame in seen if frame.event == "delta")
    assert "interrupted by user" not in seen[-1].data["content"]
    assert (await agent.post(f"/v1/agent/session/{body['session_id']}/interrupt"))[1]["interrupted"] is False
    assert (await agent.chat(turn("[[say on]]", body["session_id"], number=2)))["content"] == "on"


async def test_deleting_a_session_ends_its_turn_and_leaves_no_process_and_no_file(agent: Agent) -> None:
    daemon = "setsid sh -c 'exec sleep 300' >/dev/null 2>&1 & echo started"
    body = turn(tool("Bash", command=daemon))
    session_id = body["session_id"]
    await agent.chat(body)
    folder = SessionFolder.of(agent.state, session_id)
    pids = session_processes(folder.root, agent.cli_pid(session_id))
    assert len(pids) >= 2, "the CLI and its daemon"
    running = asyncio.create_task(agent.post("/v1/agent/chat", turn("[[fault hang]]", session_id, number=2)))
    await until(lambda: agent.server.enrolled().get(session_id).turn is not None)
    assert (await agent.delete(f"/v1/agent/session/{session_id}"))[0] == 200
    assert not any(os.path.exists(f"/proc/{pid}") and _alive(pid) for pid in pids)
    assert not folder.root.exists()
    status, error = await running
    assert (status, error["error"]["type"]) == (409, "conflict")
    assert (await agent.delete(f"/v1/agent/session/{session_id}"))[0] == 404
    assert (await agent.get(f"/v1/agent/session/{session_id}"))[0] == 404


async def test_a_concurrent_turn_or_changed_options_are_a_conflict(agent: Agent) -> None:
    body = turn("[[tokens 500]] [[rate 50]]", stream=True)
    session_id = body["session_id"]
    async with agent.client.post(f"{agent.url}/v1/agent/chat", json=body, headers=agent.headers) as answer:
        status, error = await agent.post("/v1/agent/chat", turn("me too", session_id, number=2))
        assert (status, error["error"]["type"]) == (409, "conflict")
        assert error["error"]["details"] == {"session_id": session_id, "turn": 1}
        answer.close()
    await until(lambda: agent.server.enrolled().get(session_id).turn is None)
    status, error = await agent.post("/v1/agent/chat", turn("hi", session_id, number=2, max_turns=3))
    assert (status, error["error"]["type"]) == (409, "conflict")
    status, error = await agent.post("/v1/agent/chat", turn("hi", session_id, number=2, user_id="bob"))
    assert (status, error["error"]["type"]) == (404, "not_found")


async def test_two_sessions_share_one_capacity_slot_by_parking(gateway: StandInGateway, tmp_path: Path) -> None:
    async with served_agent(gateway, tmp_path / "agent", live_sessions=1) as agent:
        one, two = new_session_id(), new_session_id()
        await agent.chat(turn("the first word is amber", one, max_turns=7))
        first_pid = agent.cli_pid(one)
        await agent.chat(turn("the first word is basalt", two))
        assert not _alive(first_pid)
        assert (await agent.get(f"/v1/agent/session/{one}"))[1]["state"] == "parked"
        assert (await agent.get("/v1/agent/stats"))[1]["live"] == 1
        resumed = await agent.chat(turn("[[recall 1]]", one, number=2, max_turns=7))
        assert "amber" in resumed["content"]
        assert resumed["notices"] == []


async def test_a_turn_without_capacity_is_refused_with_retry_after(gateway: StandInGateway, tmp_path: Path) -> None:
    gateway.configuration.max_concurrent = 2
    async with served_agent(gateway, tmp_path / "agent", live_sessions=1, room_timeout=0.3) as agent:
        busy = turn("[[tokens 500]] [[rate 20]]", stream=True)
        async with agent.client.post(f"{agent.url}/v1/agent/chat", json=busy, headers=agent.headers) as answer:
            await until(lambda: agent.server.enrolled().counts()[1] == 1)
            async with agent.client.post(
                f"{agent.url}/v1/agent/chat", json=turn("hi", stream=True), headers=agent.headers
            ) as refused:
                error = await refused.json()
                assert (refused.status, error["error"]["type"]) == (503, "at_capacity")
                assert int(refused.headers["retry-after"]) >= 1
            assert agent.server.enrolled().counts()[0] == 1, "a session whose first turn was refused is removed"
            answer.close()
        await until(lambda: agent.server.enrolled().counts()[2] == 0)
        assert (await agent.chat(turn("[[say now]]")))["content"] == "now"
        status, error = await agent.post("/v1/agent/chat", turn("a third"))
        assert (status, error["error"]["type"]) == (503, "at_capacity")
        assert error["error"]["details"] == {"sessions": 2, "capacity": 2}


async def test_heartbeats_report_load_and_readiness(gateway: StandInGateway, tmp_path: Path) -> None:
    gateway.configuration = AgentConfiguration(max_concurrent=9, tools=False, heartbeat_seconds=0.1)
    async with served_agent(gateway, tmp_path / "agent", live_sessions=1, room_timeout=1.0) as agent:
        await until(lambda: gateway.heartbeats)
        assert (gateway.heartbeats[0].ready, gateway.heartbeats[0].sessions) == (True, 0)
        session = (await agent.chat(turn("hello")))["session_id"]
        await until(lambda: (gateway.heartbeats[-1].sessions, gateway.heartbeats[-1].running) == (1, 0))
        last = gateway.heartbeats[-1]
        assert (last.live, last.memory_limit_mb, last.queue_wait_seconds) == (1, 2048, 0.0)
        assert last.memory_mb > 50
        assert any((beat.cpu or 0) > 0 for beat in gateway.heartbeats)

        busy = asyncio.create_task(agent.post("/v1/agent/chat", turn("[[tokens 2000]] [[rate 10]]", session, number=2)))
        await until(lambda: gateway.heartbeats[-1].running == 1)
        waiter = asyncio.create_task(agent.post("/v1/agent/chat", turn("hello")))
        await until(lambda: gateway.heartbeats[-1].waiting == 1)
        assert (await waiter)[0] == 503
        await until(lambda: (gateway.heartbeats[-1].queue_wait_seconds or 0) >= 1)
        async with agent.client.get(agent.url + "/metrics", headers=agent.headers) as answer:
            page = await answer.text()
        assert "agent_queue_wait_seconds_count 3.0" in page
        assert "agent_memory_utilisation 0." in page
        await agent.post(f"/v1/agent/session/{session}/interrupt")
        await busy
        drained = asyncio.create_task(agent.server.drain())
        await until(lambda: not gateway.heartbeats[-1].ready)
        await drained


async def test_a_turn_after_the_cli_was_killed_resumes_the_session(agent: Agent) -> None:
    body = turn("the first word is cobalt")
    await agent.chat(body)
    os.kill(agent.cli_pid(body["session_id"]), signal.SIGKILL)
    answer = await agent.chat(turn("[[recall 1]]", body["session_id"], number=2))
    assert "cobalt" in answer["content"]


async def test_the_session_token_is_renewed_without_a_new_process(gateway: StandInGateway, tmp_path: Path) -> None:
    gateway.session_token_seconds = 70
    async with served_agent(gateway, tmp_path / "agent") as agent:
        body = turn("one", timeout=30)
        await agent.chat(body)
        pid = agent.cli_pid(body["session_id"])
        await agent.chat(turn("two", body["session_id"], number=2, timeout=5))
        assert len(gateway.session_tokens) == 1
        await agent.chat(turn("three", body["session_id"], number=3, timeout=30))
        assert agent.cli_pid(body["session_id"]) == pid
        assert gateway.model_tokens == [gateway.session_tokens[0]] * 2 + [gateway.session_tokens[1]]


async def test_a_stale_placement_removes_the_session(agent: Agent, gateway: StandInGateway) -> None:
    gateway.session_token_seconds = 1
    body = turn("hello")
    await agent.chat(body)
    pid = agent.cli_pid(body["session_id"])
    gateway.stale.add(body["session_id"])
    status, error = await agent.post("/v1/agent/chat", turn("again", body["session_id"], number=2))
    assert (status, error["error"]["type"]) == (409, "conflict")
    # if the last turn's event was refused first, the answer may come before the session is removed
    await until(lambda: not _alive(pid))
    await until(lambda: not SessionFolder.of(agent.state, body["session_id"]).root.exists())


async def test_an_unreachable_ledger_is_reported_in_the_answer(agent: Agent, gateway: StandInGateway) -> None:
    gateway.usage_works = False
    answer = await agent.chat(turn("[[say fine]]"))
    assert answer["content"] == "fine"
    assert answer["usage"]["total_tokens"] == 0
    assert answer["notices"] == [
        "the usage is missing because the gateway did not answer; it is recorded in the ledger"
    ]


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
