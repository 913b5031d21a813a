"""The plan of `up`: the roles to start and the addresses that must be free."""

import os
import socket
from pathlib import Path

import pytest

from hypercore_agents.cli.up_plan import Plan, is_on, plan, require_free
from hypercore_agents.http.serve import AddressError
from hypercore_agents.manager.settings import ManagerSettings


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ANTHROPIC_API_KEY", "ENABLE_AUTH", "AUTOSCALER_TOKEN", "ALLOW_PLATFORM_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("STATE_DIR", str(tmp_path))


def planned(monkeypatch: pytest.MonkeyPatch, **settings: str) -> Plan:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return plan(demo="ALLOW_PLATFORM_KEY" not in settings, backend="process")


def test_the_autoscaler_address_must_be_free_only_if_one_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        for name in ("LISTEN_ADDR", "GATEWAY_ADDR", "SIMULATOR_LISTEN"):
            monkeypatch.setenv(name, "127.0.0.1:0")
        monkeypatch.setenv("AUTOSCALER_ADDR", f"127.0.0.1:{other.getsockname()[1]}")
        without_token = planned(monkeypatch, MIN_AGENTS="1", ENABLE_AUTH="y")
        assert "AUTOSCALER_TOKEN" in without_token.no_autoscaler
        require_free(without_token)
        with_token = planned(monkeypatch, AUTOSCALER_TOKEN="a-token")
        assert with_token.no_autoscaler == ""
        with pytest.raises(AddressError, match="AUTOSCALER_ADDR"):
            require_free(with_token)
        without_pool = planned(monkeypatch, MIN_AGENTS="0")
        assert "MIN_AGENTS=0" in without_pool.no_autoscaler
        require_free(without_pool)


@pytest.mark.parametrize("text", ["1", "true", "T", "yes", "Y", "on", "0", "false", "f", "No", "n", "off", ""])
def test_boolean_settings_are_parsed_as_the_manager_parses_them(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ENABLE_AUTH", text)
    monkeypatch.setenv("JWT_SECRET", "s" * 40)
    assert is_on(os.environ["ENABLE_AUTH"]) is ManagerSettings().enable_auth


def test_invalid_boolean_settings_count_as_unset() -> None:
    assert [is_on(text, otherwise=True) for text in (None, "", "maybe")] == [True, True, True]
    assert [is_on(text) for text in (None, "", "maybe")] == [False, False, False]


def test_without_a_platform_key_users_bring_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not planned(monkeypatch, ALLOW_PLATFORM_KEY="n").simulated


def test_an_exported_empty_variable_does_not_hide_the_one_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("MIN_AGENTS=1\nALLOW_PLATFORM_KEY=false\n")
    assert planned(monkeypatch, MIN_AGENTS="").pool == 1


def test_names_of_settings_ignore_case_and_other_variables_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("enable_auth=true\njwt_secret=" + "s" * 40 + "\n")
    found = planned(monkeypatch, http_proxy="http://proxy.example")
    assert "AUTOSCALER_TOKEN" in found.no_autoscaler, "authentication counts as on"
    assert found.environment["ENABLE_AUTH"] == "true"
    assert "enable_auth" not in found.environment
    assert found.environment["http_proxy"] == "http://proxy.example"
    assert "HTTP_PROXY" not in found.environment
