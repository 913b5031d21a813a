"""The command line on unusual hosts: users without a name or home, terminals without UTF-8, invalid addresses."""

import io
import json
import sys
from pathlib import Path
from unittest import mock

import pytest

from hypercore_agents.cli.main import main
from hypercore_agents.cli.remote import show_json
from support.command_line import Ended, command

_NAMES = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "HYPERCORE_AGENTS_USER")
NAMELESS: dict[str, str | None] = dict.fromkeys(_NAMES)


@pytest.fixture
def nameless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user of a container: a number without an entry in the password database."""
    monkeypatch.chdir(tmp_path)
    for function in ("getpwuid", "getpwnam"):
        monkeypatch.setattr(f"pwd.{function}", mock.Mock(side_effect=KeyError("no such user")))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("chat", "hello"), "HYPERCORE_AGENTS_USER"),
        (("spawn",), "HYPERCORE_AGENTS_USER"),
        (("keys", "list"), "STATE_DIR"),
        (("tokens", "list"), "STATE_DIR"),
        (("config", "show"), "STATE_DIR"),
        (("config", "get", "STATE_DIR"), "STATE_DIR"),
        (("down",), "STATE_DIR"),
        (("up", "--demo"), "STATE_DIR"),
        (("manager",), "STATE_DIR"),
        (("gateway",), "STATE_DIR"),
    ],
)
@pytest.mark.usefixtures("nameless")
def test_errors_for_users_without_name_or_home_name_the_variable(arguments: tuple[str, ...], named: str) -> None:
    ended = command(*arguments, given="", STATE_DIR=None, **NAMELESS)
    assert ended.code == 2, ended
    assert ended.err.count("\n") == 1
    assert named in ended.err


@pytest.mark.parametrize("listen", ["::1:18080", "no port", "h\u00f6st:80"])
def test_invalid_addresses_are_one_line_errors(listen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (("stats",), ("manager",), ("up", "--demo")):
        ended = command(*arguments, LISTEN_ADDR=listen, STATE_DIR=str(tmp_path), HYPERCORE_AGENTS_URL=None)
        assert ended.code == 2, ended
        assert "LISTEN_ADDR" in ended.err
        assert "Traceback" not in ended.err


def _with_ascii_terminal(*arguments: str) -> Ended:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict") for _ in range(2))
    with mock.patch.multiple(sys, stdout=out, stderr=err, argv=["hypercore-agents", *arguments]):
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        out.flush()
        err.flush()
    return Ended(code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode())


def test_ascii_terminals_get_escapes_instead_of_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STATE_DIR", str(tmp_path / "gr\u00fc\u00dfe"))
    shown = _with_ascii_terminal("config", "get", "STATE_DIR")
    assert (shown.code, "gr\\xfc\\xdfe" in shown.out) == (0, True)
    as_json = _with_ascii_terminal("config", "get", "STATE_DIR", "--json")
    assert json.loads(as_json.out)["value"].endswith("gr\u00fc\u00dfe")
    assert _with_ascii_terminal("doctor").code in (0, 1)


def test_json_is_unescaped_if_the_output_supports_it(capsys: pytest.CaptureFixture[str]) -> None:
    show_json({"name": "gr\u00fc\u00dfe"})
    assert "gr\u00fc\u00dfe" in capsys.readouterr().out
