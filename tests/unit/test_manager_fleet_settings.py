"""Pure functions of the manager: agent lifecycle, session options, stored errors, tools, settings, warnings."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.errors import AtCapacity, Conflict, HypercoreError, InternalError, InvalidRequest
from hypercore_agents.api.options import SessionOptions
from hypercore_agents.compute.base import Capabilities, InsufficientResources, SandboxError, SandboxRefused
from hypercore_agents.manager.fleet import failures, lifecycle
from hypercore_agents.manager.fleet.tools import configuration
from hypercore_agents.manager.sessions.options import freeze, refuse_changes
from hypercore_agents.manager.settings import NOT_ENFORCED, ManagerSettings, warnings_about
from hypercore_agents.store.agents import LIVE_STATES


def test_every_live_agent_state_may_fail_and_only_ended_states_are_final() -> None:
    assert set(lifecycle.TRANSITIONS) == set(AgentState)
    for state in LIVE_STATES:
        lifecycle.check(state, AgentState.FAILED)
    assert {AgentState.STOPPED, AgentState.FAILED} == lifecycle.ENDED


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (AgentState.RUNNING, AgentState.STOPPED),
        (AgentState.PENDING, AgentState.RUNNING),
        (AgentState.DRAINING, AgentState.RUNNING),
        (AgentState.STOPPED, AgentState.PENDING),
        (AgentState.FAILED, AgentState.STARTING),
    ],
)
def test_a_transition_outside_of_the_table_raises(before: AgentState, after: AgentState) -> None:
    with pytest.raises(lifecycle.IllegalTransition, match=before.value):
        lifecycle.check(before, after)


def test_request_options_override_the_agents_and_the_platforms() -> None:
    platform = SessionOptions(model="platform", max_turns=9)
    agent = SessionOptions(model="agent", system_prompt="agent's", tools=["Read"])
    said = SessionOptions(system_prompt="mine", tools=[])
    assert freeze(said.with_defaults(agent.with_defaults(platform))) == {
        "model": "agent",
        "max_turns": 9,
        "system_prompt": "mine",
        "tools": [],
    }


@pytest.mark.parametrize(
    "said",
    [
        SessionOptions(),
        SessionOptions(tools=["Bash", "Read", "Bash"]),
        SessionOptions(max_budget_usd=1.0),
        SessionOptions.model_validate({"mcp_servers": {"a": {"command": "x"}}}),
    ],
)
def test_a_repeated_option_is_accepted(said: SessionOptions) -> None:
    frozen = {
        "tools": ["Read", "Bash"],
        "max_budget_usd": 1,
        "mcp_servers": {"a": {"type": "stdio", "command": "x", "args": []}},
    }
    refuse_changes(said, frozen)


@pytest.mark.parametrize(
    ("said", "field"),
    [
        (SessionOptions(tools=["Read"]), "tools"),
        (SessionOptions(tools=[]), "tools"),
        (SessionOptions(model="other"), "model"),
        (SessionOptions(permission_mode="plan"), "permission_mode"),
    ],
)
def test_a_changed_option_is_a_conflict_that_names_it(said: SessionOptions, field: str) -> None:
    with pytest.raises(Conflict) as caught:
        refuse_changes(said, {"tools": ["Read", "Bash"], "model": "one"})
    assert caught.value.details == {"field": field}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InsufficientResources("2 of 2 taken"), AtCapacity),
        (SandboxRefused("no GPU: leave it out", field="gpu_quota"), InvalidRequest),
        (SandboxError("disk: full"), HypercoreError),
    ],
)
def test_a_stored_failure_is_restored_with_its_type(error: HypercoreError, kind: type[HypercoreError]) -> None:
    told = failures.restore(failures.describe(error), "agent-x")
    assert isinstance(told, kind)
    assert (told.status, told.type, told.message) == (error.status, error.type, error.message)
    assert told.details == {"agent_id": "agent-x"}


def test_an_unreadable_failure_is_an_internal_error() -> None:
    assert isinstance(failures.restore("something odd", "agent-x"), InternalError)


@pytest.mark.parametrize(
    ("kind", "agents", "sessions", "allowed", "tools"),
    [
        (AgentKind.POOL, True, True, False, True),
        (AgentKind.POOL, True, False, False, False),
        (AgentKind.DEDICATED, True, False, False, True),
        (AgentKind.DEDICATED, False, False, False, False),
        (AgentKind.POOL, False, False, True, True),
    ],
)
def test_tools_need_isolation_or_the_operators_permission(
    kind: AgentKind, agents: bool, sessions: bool, allowed: bool, tools: bool
) -> None:
    capabilities = Capabilities(
        "a uid each", separates_agents=agents, separates_sessions=sessions, separates_network=True
    )
    told = configuration(kind, 5, capabilities, allow_unisolated=allowed)
    assert (told.max_concurrent, told.tools) == (5, tools)
    assert (told.tools_reason is None) == tools


def test_tools_are_off_if_they_could_reach_the_managers_port() -> None:
    capabilities = Capabilities("a uid each", separates_agents=True, separates_sessions=True)
    told = configuration(AgentKind.DEDICATED, 5, capabilities, allow_unisolated=False)
    assert not told.tools
    assert "ALLOW_UNISOLATED_TOOLS" in str(told.tools_reason)


def settings(**values: object) -> ManagerSettings:
    return ManagerSettings(_env_file=None, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"min_agents": -1}, "min_agents"),
        ({"min_agents": 5, "max_agents": 4}, "MIN_AGENTS=5"),
        ({"listen_addr": "8080"}, "listen_addr"),
        ({"listen_addr": "0.0.0.0:8080"}, "ENABLE_AUTH=true"),
        ({"enable_auth": True}, "JWT_SECRET"),
        ({"enable_auth": True, "jwt_secret": "short"}, "JWT_SECRET"),
        ({"base_domain": "10.0.0.1"}, "base_domain"),
        ({"gateway_url": "ftp://x"}, "gateway_url"),
        ({"request_timeout": 3601}, "request_timeout"),
        ({"pool_config": {"colour": 1}}, "colour"),
    ],
)
def test_an_invalid_setting_is_rejected_by_name(values: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says) as caught:
        settings(**values)
    assert "short" not in str(caught.value)


def test_settings_are_read_from_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POOL_CONFIG", '{"cores": 1, "memory": 512, "tools": ["Read"], "model": "m"}')
    monkeypatch.setenv("STATE_DIR", str(tmp_path))
    monkeypatch.setenv("LOG_LEVEL", "debug")
    monkeypatch.setenv("BASE_DOMAIN", "Agents.Example.com.")
    chosen = settings()
    assert (chosen.pool_config.cores, chosen.pool_config.memory) == (1, 512)
    assert chosen.pool_config.options == SessionOptions(tools=["Read"], model="m")
    assert (chosen.log_level, chosen.base_domain) == ("DEBUG", "agents.example.com")
    assert chosen.store_url.endswith(f"{tmp_path}/store.db")
    assert not chosen.prometheus_is_configured


def test_a_public_address_is_allowed_with_authentication() -> None:
    assert settings(listen_addr="0.0.0.0:8080", enable_auth=True, jwt_secret="s" * 32).enable_auth


def test_ineffective_and_misspelt_variables_cause_warnings(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("MAX_AGENT=3\nCLAUDE_MODEL=x\n")
    found = warnings_about({"REDIS_URL": "x", "ENABLE_AUHT": "1", "PATH": "/bin", "MIN_AGENTS": "1"}, env_file)
    assert [warning.partition(" ")[0] for warning in found] == ["REDIS_URL", "ENABLE_AUHT", "MAX_AGENT"]
    assert "not enforced" in found[0]
    assert "ENABLE_AUTH" in found[1]
    assert "MAX_AGENTS" in found[2]


def test_an_unused_proxy_variable_causes_a_warning() -> None:
    found = warnings_about({"HTTPS_PROXY": "http://proxy:3128", "http_proxy": "", "NO_PROXY": "x", "all_proxy": "y"})
    assert [warning.partition(" ")[0] for warning in found] == ["HTTPS_PROXY", "all_proxy"]
    assert "CLAUDE_API_URL" in found[0]


def test_no_effective_setting_is_reported_as_not_enforced() -> None:
    assert not {name.upper() for name in ManagerSettings.model_fields} & set(NOT_ENFORCED)
