"""Each Agent SDK option that is offered over HTTP takes effect, with the real CLI, as the simulator's requests show."""

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hypercore_agents.api.ids import new_session_id
from support.agent_server import MCP_SERVER, Agent, served_agent, stand_in_gateway, tool, turn
from support.simulator_fixtures import RunningSimulator

OTHER = "claude-haiku-4-5"
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}},
    "required": ["answer"],
    "additionalProperties": False,
}


pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def skills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with valid skills in several forms, and one whose two names differ."""
    folder = tmp_path_factory.mktemp("skills")
    for name, named in (("house-style", "house-style"), ("taxes", "taxes"), ("odd", "even")):
        (folder / name).mkdir()
        (folder / name / "SKILL.md").write_text(SKILL.format(name=named, folder=name))
        (folder / name / "template.txt").write_text(f"the template of {name}")
    for name, manifest in OTHER_FORMS.items():
        (folder / name).mkdir()
        (folder / name / "SKILL.md").write_bytes(manifest.encode())
    return folder


OTHER_FORMS = {
    "bom": "\ufeff---\nname: bom\ndescription: Knows all about bom.\n---\nRules of bom.\n",
    "commented": "---\nname: commented # so\ndescription: Knows all about commented.\n---\nRules of commented.\n",
    "folded": "---\nname: >-\n  folded\ndescription: >-\n  Knows all\n  about folded.\n---\nRules of folded.\n",
    "nameless": "---\ndescription: Knows all about nameless.\n---\nRules of nameless.\n",
    "windows": "---\r\nname: 'windows'\r\ndescription: Knows all about windows.\r\n---\r\nRules of windows.\r\n",
}
"""Manifests that the CLI accepts: a byte order mark, a comment, block scalars, no name, Windows line ends."""


SKILL = """---
name: {name}
description: Knows all about {folder}.
---
Follow the house rules of {folder}.
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agent(
    simulator_process: RunningSimulator, skills: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Agent]:
    state = tmp_path_factory.mktemp("options") / "agent"
    async with (
        stand_in_gateway(simulator_process.url) as gateway,
        served_agent(gateway, state, skills_dir=skills) as running,
    ):
        yield running


async def first_turn(agent: Agent, simulator: RunningSimulator, prompt: str, **options: Any) -> tuple[Any, list[Any]]:
    """Run a new session's first turn; return the answer and the bodies of the simulator's requests."""
    session_id = new_session_id()
    answer = await agent.chat(turn(prompt, session_id, **options))
    return answer, [request["body"] for request in simulator.requests(session_id)]


def system_of(body: dict[str, Any]) -> str:
    system = body["system"]
    return system if isinstance(system, str) else "\n".join(block["text"] for block in system)


def tools_of(body: dict[str, Any]) -> set[str]:
    return {tool["name"] for tool in body.get("tools", ())}


async def test_an_overloaded_model_is_replaced_by_the_fallback_model(agent: Agent, simulator: RunningSimulator) -> None:
    _, bodies = await first_turn(agent, simulator, "hello", model=OTHER)
    assert [body["model"] for body in bodies] == [OTHER]
    answer, bodies = await first_turn(
        agent, simulator, "[[fault 529 times=3]] [[say done]]", model="claude-sonnet-4-5", fallback_model=OTHER,
        timeout=90,
    )  # fmt: skip
    assert answer["content"] == "done"
    assert bodies[0]["model"] == "claude-sonnet-4-5"
    assert bodies[-1]["model"] == OTHER


async def test_text_is_appended_to_a_preset_prompt(agent: Agent, simulator: RunningSimulator) -> None:
    appended = "Answer like a pirate. " * 10
    _, [body] = await first_turn(
        agent, simulator, "hello", system_prompt={"type": "preset", "preset": "claude_code", "append": appended}
    )
    system = system_of(body)
    assert appended.strip() in system
    assert len(system) > 3000, "the preset itself is present"
    _, [body] = await first_turn(agent, simulator, "hello", system_prompt={"type": "preset"})
    assert "pirate" not in system_of(body)
    assert len(system_of(body)) > 3000
    _, [body] = await first_turn(agent, simulator, "hello", system_prompt="Only this.")
    assert "Only this." in system_of(body)
    assert len(system_of(body)) < 1000


async def test_effort_and_thinking_reach_the_model(agent: Agent, simulator: RunningSimulator) -> None:
    _, [body] = await first_turn(agent, simulator, "hello", effort="low", model="claude-opus-4-6")
    assert body["output_config"]["effort"] == "low"
    _, [body] = await first_turn(agent, simulator, "hello", thinking={"type": "enabled", "budget_tokens": 2000})
    assert body["thinking"]["budget_tokens"] == 2000
    _, [body] = await first_turn(agent, simulator, "hello", thinking={"type": "disabled"})
    assert body.get("thinking", {"type": "disabled"})["type"] == "disabled"


async def test_an_output_schema_gives_parsed_output(agent: Agent, simulator: RunningSimulator) -> None:
    prompt = f"[[tool StructuredOutput {json.dumps({'answer': 42})}]]"
    answer, bodies = await first_turn(agent, simulator, prompt, output_schema=SCHEMA, tools=[])
    assert answer["output"] == {"answer": 42}
    schema = next(tool for tool in bodies[0]["tools"] if tool["name"] == "StructuredOutput")["input_schema"]
    assert schema["properties"] == SCHEMA["properties"]
    status, body = await agent.post("/v1/agent/chat", turn("hello", output_schema={"type": "string"}))
    assert (status, body["error"]["type"]) == (400, "invalid_request")


async def test_an_answer_that_violates_the_schema_is_an_error(agent: Agent, simulator: RunningSimulator) -> None:
    session_id = new_session_id()
    invalid = tool("StructuredOutput", answer="forty-two") * 8
    status, body = await agent.post("/v1/agent/chat", turn(invalid, session_id, output_schema=SCHEMA, tools=[]))
    assert (status, body["error"]["type"]) == (502, "model_error"), body
    assert body["error"]["details"]["field"] == "output_schema"
    valid = tool("StructuredOutput", answer=42)
    answer = await agent.chat(turn(valid, session_id, number=2, output_schema=SCHEMA, tools=[]))
    assert answer["output"] == {"answer": 42}


async def test_subagents_run_with_their_own_prompt(agent: Agent, simulator: RunningSimulator) -> None:
    agents = {"reviewer": {"description": "Reviews code.", "prompt": "You review, sternly.", "tools": ["Read"]}}
    work = {"description": "review", "subagent_type": "reviewer", "prompt": "[[say looks fine]]"}
    answer, bodies = await first_turn(
        agent, simulator, f"[[tool Agent {json.dumps(work)}]] [[say reported]]", agents=agents
    )
    assert "reported" in answer["content"]
    assert "Agent" in tools_of(bodies[0])
    assert "Reviews code." in json.dumps(bodies[0])
    own = [body for body in bodies if "You review, sternly." in system_of(body)]
    assert own, "the subagent's model requests have its own prompt"
    assert tools_of(own[0]) <= {"Read"}


async def test_only_enabled_skills_can_be_used(agent: Agent, simulator: RunningSimulator, skills: Path) -> None:
    session_id = new_session_id()
    options: dict[str, Any] = {"skills": ["house-style"], "tools": ["Read", "Bash"]}
    own = tool("Bash", command=f"mkdir -p .claude/skills && cp -r {skills}/taxes .claude/skills/taxes")
    await agent.chat(turn(own + tool("Skill", skill="house-style:house-style"), session_id, **options))
    first, last = (simulator.requests(session_id)[at]["body"] for at in (0, -1))
    assert "Skill" in tools_of(first)
    assert "Knows all about house-style." in json.dumps(first)
    assert "Follow the house rules of house-style." in json.dumps(last["messages"])
    assert "Knows all about taxes." not in json.dumps(first), "a skill that was not requested is not offered"
    reading = tool("Read", file_path=str(skills / "house-style" / "template.txt"))
    refused = "".join(tool("Skill", skill=name) for name in ("taxes", "debug"))
    outside = tool("Read", file_path=str(skills / "taxes" / "template.txt"))
    await agent.chat(turn(reading + refused + outside, session_id, number=2, **options))
    results = [
        (str(block["content"]), bool(block.get("is_error")))
        for message in simulator.requests(session_id)[-1]["body"]["messages"]
        for block in message["content"]
        if isinstance(block, dict) and block["type"] == "tool_result"
    ][-4:]
    assert "the template of house-style" in results[0][0]
    assert [failed for _, failed in results] == [False, True, True, True], results


async def test_skills_with_every_manifest_form_of_the_cli_work(agent: Agent, simulator: RunningSimulator) -> None:
    session_id = new_session_id()
    for number, name in enumerate(OTHER_FORMS, start=1):
        using = tool("Skill", skill=f"{name}:{name}")
        await agent.chat(turn(using, session_id, number=number, skills=[*OTHER_FORMS], tools=["Read"]))
        bodies = [json.dumps(request["body"]) for request in simulator.requests(session_id)]
        assert f"Knows all about {name}." in bodies[0]
        assert f"Rules of {name}." in bodies[-1], "the skill was used"


async def test_an_unknown_skill_gives_400_with_the_known_ones(agent: Agent) -> None:
    for name, why in (("poetry", "does not exist"), ("odd", "different name"), ("../etc", "skills")):
        status, body = await agent.post("/v1/agent/chat", turn("hello", skills=[name]))
        assert (status, body["error"]["type"]) == (400, "invalid_request"), body
        assert why in body["error"]["message"]
        if name == "poetry":
            assert "house-style, nameless, odd, taxes, windows" in body["error"]["message"]
            assert body["error"]["details"]["field"] == "skills"


async def test_tools_rules_permission_mode_and_max_turns_take_effect(agent: Agent, simulator: RunningSimulator) -> None:
    _, [body] = await first_turn(agent, simulator, "hello", tools=["Read", "Bash"])
    assert tools_of(body) == {"Read", "Bash"}
    _, [body] = await first_turn(agent, simulator, "hello", tools=["Read", "Bash"], disallowed_tools=["Bash"])
    assert tools_of(body) == {"Read"}
    write = json.dumps({"file_path": "a.txt", "content": "hi"})
    for options, denied in (
        ({"permission_mode": "acceptEdits"}, False),
        ({"permission_mode": "dontAsk", "allowed_tools": []}, True),
        ({"allowed_tools": ["Edit(./**)"]}, False),
        ({"permission_mode": "plan", "allowed_tools": []}, True),
    ):
        _, bodies = await first_turn(
            agent, simulator, f"[[tool Write {write}]] [[say end]]", tools=["Write"], **options
        )
        results = [b for m in bodies[-1]["messages"] for b in m["content"] if isinstance(b, dict) and b.get("is_error")]
        assert bool(results) is denied, options
    answer, bodies = await first_turn(
        agent, simulator, "[[tool Bash {\"command\": \"true\"}]] [[say end]]", tools=["Bash"], max_turns=1
    )  # fmt: skip
    assert (answer["status"], len(bodies)) == ("max_turns", 1)


async def test_settings_and_memory_written_by_a_tool_have_no_effect(agent: Agent, simulator: RunningSimulator) -> None:
    """A hook would run without approval, and a memory would instruct the model in place of the operator."""
    session_id = new_session_id()
    hook = {"hooks": {"UserPromptSubmit": [{"hooks": [{"type": "command", "command": "touch $HOME/hooked ./hooked"}]}]}}
    write = (
        f"mkdir -p .claude && echo '{json.dumps(hook)}' | tee .claude/settings.json .claude/settings.local.json "
        "> $CLAUDE_CONFIG_DIR/settings.json && "
        "echo REMEM''BERED | tee CLAUDE.md CLAUDE.local.md .claude/CLAUDE.md $CLAUDE_CONFIG_DIR/CLAUDE.md && ls -a"
    )
    first = await agent.chat(turn(tool("Bash", command=write), session_id, tools=["Bash"]))
    assert first["status"] == "completed", first
    assert await agent.server.enrolled().get(session_id).park()
    search = "find . $HOME -name hooked; cat .claude/settings.json | head -c 8; echo; echo searched"
    await agent.chat(turn(tool("Bash", command=search), session_id, number=2, tools=["Bash"]))
    first_request, last_request = (request["body"] for request in simulator.requests(session_id)[-2:])
    assert "REMEMBERED" not in system_of(first_request) + json.dumps(first_request["messages"][-1])
    (result,) = [block for block in last_request["messages"][-1]["content"] if block["type"] == "tool_result"]
    assert str(result["content"]).count("hook") == 1, result
    assert "searched" in str(result["content"])


async def test_a_stdio_mcp_server_runs(agent: Agent, simulator: RunningSimulator, tmp_path: Path) -> None:
    server = tmp_path / "notes.py"
    server.write_text(MCP_SERVER)
    servers = {"notes": {"command": sys.executable, "args": ["-I", "-S", str(server)]}}
    prompt = '[[tool mcp__notes__remember {"word": "cobalt"}]] [[say end]]'
    _, bodies = await first_turn(agent, simulator, prompt, mcp_servers=servers, tools=[], timeout=90)
    assert "mcp__notes__remember" in tools_of(bodies[0])
    assert "kept cobalt" in json.dumps(bodies[-1]["messages"])


async def test_lone_surrogates_of_an_mcp_server_are_replaced(agent: Agent, tmp_path: Path) -> None:
    """Programs that count in UTF-16 cut texts in the middle of a character; literal backslashes remain."""
    server = tmp_path / "cut.py"
    server.write_text(MCP_SERVER.replace('"kept "', r'"kept \ud83d "'))
    servers = {"cut": {"command": sys.executable, "args": ["-I", "-S", str(server)]}}
    session_id = new_session_id()
    prompt = r'[[tool mcp__cut__remember {"word": "cobalt"}]] [[say the end]] \u0000 \ud83d'
    events = await agent.stream(turn(prompt, session_id, stream=True, timeout=90, mcp_servers=servers, tools=[]))
    (result,) = [frame.data for frame in events if frame.event == "tool_result"]
    assert result["content"] == "kept \ufffd cobalt"
    assert events[-1].event == "result", events[-1]
    assert events[-1].data["durable"] is True
    lines = [entry.line for entry in agent.gateway.transcripts[session_id].values()]
    assert prompt in [json.loads(line).get("message", {}).get("content") for line in lines]
    assert any("kept \ufffd cobalt" in line for line in lines)
