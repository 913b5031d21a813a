"""Translation of session options to the SDK's, the CLI's environment, and the agent's settings."""

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hypercore_agents.agent.claude.environment import RETAINED, cli_environment, scrub
from hypercore_agents.agent.claude.options import (
    DEFAULT_TOOLS,
    SYSTEM_PROMPT_FILE,
    Offer,
    bundled_cli,
    check,
    offer,
    sdk_options,
)
from hypercore_agents.agent.isolation.backends import SharedUserIsolation
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.agent.settings import AgentSettings
from hypercore_agents.api.errors import InvalidRequest
from hypercore_agents.api.ids import new_agent_id, new_session_id
from hypercore_agents.api.internal import AgentConfiguration
from hypercore_agents.api.options import SessionOptions, StdioMcpServer

ON = AgentConfiguration(max_concurrent=1, tools=True)
OFF = AgentConfiguration(max_concurrent=1, tools=False, tools_reason="one uid")
SKILLS = Path("/opt/skills")
SERVERS = {"notes": StdioMcpServer(command="notes-server", args=["--read-only"])}


def options(**fields: Any) -> SessionOptions:
    return SessionOptions(**fields)


def test_the_default_rules_allow_offered_tools_and_edits_in_the_workspace() -> None:
    assert offer(options(), ON) == Offer(DEFAULT_TOOLS, ("Bash", "Edit(./**)"), False)
    assert offer(options(tools=["Write", "WebFetch", "Write"]), ON) == Offer(
        ("Write", "WebFetch"), ("WebFetch", "Edit(./**)"), False
    )
    assert offer(options(tools=[], mcp_servers=SERVERS), ON) == Offer((), ("mcp__notes",), True)


def test_a_mode_or_explicit_rules_replace_the_default_rules() -> None:
    assert offer(options(permission_mode="acceptEdits"), ON).allowed == ()
    assert offer(options(allowed_tools=["Bash(ls *)"]), ON).allowed == ("Bash(ls *)",)
    assert offer(options(allowed_tools=[]), ON).allowed == ()


def test_disabled_tools_give_notices() -> None:
    assert offer(options(), OFF) == Offer((), (), False, ("tools are off on this agent: one uid",))
    assert offer(options(tools=[]), OFF).notices == (), "no tools were requested"
    offered = offer(options(tools=["Bash"], mcp_servers=SERVERS), OFF)
    assert offered.notices[1] == "requested but not available: Bash, MCP server notes"
    assert not offered.any


def test_enabled_skills_bring_their_tool_and_read_rules() -> None:
    wanted = options(tools=[], skills=["taxes"])
    assert offer(wanted, ON) == Offer(("Skill",), ("Skill",), False, skills=("taxes",))
    assert offer(wanted, OFF).notices[1] == "requested but not available: skill taxes"
    folder = SessionFolder.of(Path("/state"), new_session_id())
    made = sdk_options(
        wanted, offer(wanted, ON), folder, cli=bundled_cli(), environment={}, resume=False, skills=SKILLS
    )
    assert made.skills == ["taxes:taxes"]
    assert made.plugins == [{"type": "local", "path": "/opt/skills/taxes"}]
    assert "Read(//opt/skills/taxes/**)" in made.allowed_tools
    none = sdk_options(
        wanted, offer(wanted, OFF), folder, cli=bundled_cli(), environment={}, resume=False, skills=SKILLS
    )
    assert (none.skills, none.plugins, none.allowed_tools) == ([], [], [])


def test_bypass_permissions_is_rejected_for_root() -> None:
    check(options(permission_mode="bypassPermissions"), as_root=False)
    with pytest.raises(InvalidRequest, match="permission_mode"):
        check(options(permission_mode="bypassPermissions"), as_root=True)


def test_sessions_share_no_settings_and_prompts_are_in_files(tmp_path: Path) -> None:
    folder = SessionFolder.of(tmp_path, new_session_id())
    folder.create()
    wanted = options(system_prompt="be brief", max_turns=3, model="claude-x", mcp_servers=SERVERS)
    first = sdk_options(
        wanted, offer(wanted, ON), folder, cli=bundled_cli(), environment={}, resume=False, skills=SKILLS
    )
    assert first.system_prompt == {"type": "file", "path": str(folder.system_prompt)}
    SharedUserIsolation(tmp_path, "http://gateway").transport(first, folder, {SYSTEM_PROMPT_FILE: "be brief"})
    assert folder.system_prompt.read_text() == "be brief"
    assert folder.system_prompt.stat().st_mode & 0o777 == 0o600
    assert (first.setting_sources, first.skills, first.plugins, first.strict_mcp_config) == ([], [], [], True)
    assert (first.verbatim_prompts, first.include_partial_messages, first.permission_mode) == (True, True, "dontAsk")
    assert (first.session_id, first.resume) == (folder.session_id, None)
    assert (first.max_turns, first.model, first.cwd) == (3, "claude-x", folder.workspace)
    again = sdk_options(
        wanted, offer(wanted, OFF), folder, cli=bundled_cli(), environment={}, resume=True, skills=SKILLS
    )
    assert (again.session_id, again.resume) == (None, folder.session_id)
    assert (again.tools, again.mcp_servers) == ([], {})


def test_scrub_retains_only_a_few_variables() -> None:
    environment = {"PATH": "/bin", "LANG": "C", "SECRET": "x", "ANTHROPIC_API_KEY": "y", "HOME": "/root"}
    scrub(environment)
    assert environment == {"PATH": "/bin", "LANG": "C"}
    empty: dict[str, str] = {}
    scrub(empty)
    assert set(empty) <= RETAINED


def test_the_cli_gets_its_gateway_token_and_folders(tmp_path: Path) -> None:
    folder = SessionFolder.of(tmp_path, new_session_id())
    made = cli_environment(folder, gateway_url="http://g", session_token="token", timeout=5, base={"PATH": "/bin"})
    assert made["ANTHROPIC_BASE_URL"] == "http://g"
    assert made["ANTHROPIC_AUTH_TOKEN"] == "token"
    assert made["API_TIMEOUT_MS"] == "5000"
    for name in ("HOME", "TMPDIR", "CLAUDE_CONFIG_DIR"):
        assert made[name].startswith(str(folder.root))
    assert "ANTHROPIC_API_KEY" not in made


async def test_a_session_folder_is_private_and_always_removable(tmp_path: Path) -> None:
    folder = SessionFolder.of(tmp_path, new_session_id())
    folder.create()
    for path in (folder.root, folder.home, folder.configuration, folder.workspace, folder.temporary):
        assert path.stat().st_mode & 0o777 == 0o700
    locked = folder.workspace / "locked"
    locked.mkdir()
    (locked / "file").write_text("x")
    (folder.workspace / "link").symlink_to("/nowhere")
    locked.chmod(0)
    assert not folder.has_transcript()
    transcript = folder.configuration / "projects" / "key" / f"{folder.session_id}.jsonl"
    transcript.parent.mkdir(parents=True)
    transcript.touch()
    assert folder.has_transcript()
    await folder.remove()
    assert not folder.root.exists()
    await folder.remove()


BASE = {
    "AGENT_ID": new_agent_id(),
    "GATEWAY_URL": "http://127.0.0.1:8090/",
    "AGENT_STATE_DIR": "/var/lib/agent",
    "ENROLMENT_FD": "3",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith(("AGENT_", "GATEWAY_", "ENROLMENT_", "MAX_", "LIVE_", "LOG_", "METRICS_", "CLAUDE_")):
            monkeypatch.delenv(name)
    for name, value in BASE.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_settings_come_from_the_environment(environment: pytest.MonkeyPatch) -> None:
    settings = AgentSettings()
    assert settings.gateway_url == "http://127.0.0.1:8090"
    assert (settings.agent_host, settings.agent_port, settings.max_concurrent_requests) == ("127.0.0.1", 8080, 100)
    environment.setenv("AGENT_MEMORY_MB", "2048")
    assert AgentSettings().live_limit() == 13
    environment.setenv("AGENT_MEMORY_MB", "128")
    assert AgentSettings().live_limit() == 1
    environment.setenv("AGENT_MEMORY_MB", "65536")
    assert AgentSettings().live_limit() == 100
    environment.setenv("LIVE_SESSIONS", "7")
    assert AgentSettings().live_limit() == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AGENT_ID", "nobody"),
        ("GATEWAY_URL", "127.0.0.1:8090"),
        ("GATEWAY_URL", "http://127.0.0.1/path/"),
        ("AGENT_STATE_DIR", "relative"),
        ("ENROLMENT_FD", "-1"),
        ("MAX_CONCURRENT_REQUESTS", "0"),
        ("LIVE_SESSIONS", "none"),
        ("AGENT_PORT", "70000"),
        ("LOG_LEVEL", "loud"),
    ],
)
def test_an_invalid_setting_is_rejected_by_name(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment.setenv(name, value)
    with pytest.raises(ValidationError) as raised:
        AgentSettings()
    assert [str(fault["loc"][0]).upper() for fault in raised.value.errors()] == [name]
