"""Every command of the command line: help, `--json` output and completion.

Commands run in this process, because separate processes would take half a minute in total. Commands that serve are
exempt: they print their log, whose format LOG_FORMAT sets.
"""

import asyncio
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import typer.main

from hypercore_agents.cli.main import app
from hypercore_agents.compute.microvm.image.built_image import FILES
from hypercore_agents.compute.microvm.image.inputs import inputs_id
from support.command_line import command
from support.manager_server import deployed

SERVE = {"manager", "gateway", "autoscaler", "agent", "simulator"}


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield every command under its full name."""
    if not hasattr(command, "commands"):
        yield " ".join(path), command
        return
    for name, below in command.commands.items():
        yield from walk(below, (*path, name))


COMMANDS = dict(walk(typer.main.get_command(app)))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_and_a_json_option(name: str) -> None:
    command = COMMANDS[name]
    assert command.help, "no purpose"
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    assert not [option.name for option in options if not option.help], "options without help"
    has_json = any("--json" in option.opts for option in options)
    assert has_json == (name not in SERVE)


@pytest.mark.parametrize("group", ["", "blobs", "files", "keys", "store", "tokens", "image", "config"])
def test_command_lists_show_descriptions_in_full(group: str) -> None:
    shown = command(*group.split(), "--help", COLUMNS="80", TERMINAL_WIDTH="80")
    assert [line for line in shown.out.splitlines() if line.endswith("...") and "COMMAND" not in line] == []
    assert "Usage" in shown.out


def an_image(folder: Path) -> None:
    """Create files that are accepted as the current image."""
    image = folder / "images" / "some-image"
    image.mkdir(parents=True)
    for name in FILES:
        (image / name).write_bytes(b"")
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    files = dict.fromkeys(FILES, nothing)
    manifest = {"image_id": "some-image", "inputs_id": inputs_id(), "created_at": 1.0, "kernel": "6.1", "files": files}
    (image / "manifest.json").write_text(json.dumps(manifest))


async def test_every_command_prints_json_with_the_json_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = tmp_path / "operator"
    state.mkdir()
    an_image(tmp_path / "images")
    for name, value in {
        "STATE_DIR": str(state),
        "HYPERCORE_IMAGE_DIR": str(tmp_path / "images"),
        "HYPERCORE_AGENTS_USER": "ada",
        "COMPUTE_BACKEND": "process",
        "HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    untested = set(COMMANDS) - SERVE

    async def run_json(line: str, *more: str, given: str = "", code: int = 0) -> Any:
        name = max((name for name in COMMANDS if f"{line} ".startswith(f"{name} ")), key=len)
        untested.discard(name)
        arguments = [*line.split(), *more, "--json"]
        ended = await asyncio.to_thread(command, *arguments, given=given)
        assert ended.code == code, (arguments, ended)
        return json.loads(ended.out)

    # The manager in this process must not log to the inspected standard output.
    with structlog.testing.capture_logs():
        async with deployed(tmp_path / "state") as site:
            monkeypatch.setenv("HYPERCORE_AGENTS_URL", site.url)
            agent = (await run_json("spawn --cores 1"))["agent_id"]
            site.host.print(agent, b"one\ntwo\n")
            assert (await run_json("get", agent))["agent_id"] == agent
            assert (await run_json("list"))["count"] == 1
            said = await run_json("chat hello --agent", agent)
            assert said["content"] == "you said hello"
            session = said["session_id"]
            (tmp_path / "a.txt").write_text("a")
            assert (await run_json("files put", session, "a.txt"))["path"] == "a.txt"
            assert (await run_json("files list", session))["files"] == []
            assert (await run_json("files get", session, "a.txt"))["base64"] == "e30="
            assert (await run_json("files delete", session, "a.txt"))["path"] == "a.txt"
            shown = await run_json("get", said["session_id"])
            assert (shown["session_id"], shown["state"], shown["history"]) == (said["session_id"], "live", [])
            assert (await run_json("logs", agent))["lines"] == ["one", "two"]
            assert (await run_json("stats"))["total_agents"] == 1
            assert (await run_json("usage"))["rows"] == []
            assert (await run_json("delete", agent))["agent_id"] == agent

    assert await run_json("keys add ada", given="sk-ant-0123456789\n") == {"owner": "user:ada", "stored": True}
    assert [row["owner"] for row in await run_json("keys list")] == ["user:ada"]
    assert await run_json("keys rotate") == {"rewrapped": 1}
    assert await run_json("keys prune --force") == {"dropped": 1}
    assert (await run_json("keys remove ada"))["removed"] is True
    (state / "keys.json").unlink()
    assert await run_json("keys reset") == {"deleted": 0}
    assert await run_json("store adopt") == {"adopted": True, "before": None}
    (tmp_path / "old").mkdir()
    assert await run_json(f"blobs move --from file://{tmp_path}/old") == {
        "copied": 0,
        "present": 0,
        "missing_sessions": [],
    }
    made = await run_json("tokens create ci --scope admin --days 2")
    assert len(made["token"]) == 43
    listed = await run_json("tokens list")
    assert [(row["name"], row["expires_at"]) for row in listed] == [("ci", made["expires_at"])]
    assert (await run_json("tokens revoke ci"))["revoked"] is True
    assert (await run_json("image build"))["image_id"] == "some-image"
    assert [image["current"] for image in await run_json("image list")] == [True]
    assert (await run_json("image verify"))[0]["ok"] is True
    (tmp_path / "images" / "images" / "some-image" / "initrd").write_bytes(b"other")
    assert (await run_json("image verify", code=1))[0]["faults"] == ["initrd differs from what was built"]
    assert await run_json("image prune") == {"removed": []}
    assert (await run_json("config get", "LOG_FORMAT"))["value"] == "json"
    assert {"name", "value", "source", "roles"} == set((await run_json("config show"))[0])
    assert {"python", "claude cli"} <= {finding["name"] for finding in await run_json("doctor")}

    demo = state / "demo"
    demo.mkdir()
    (demo / "up.json").write_text('{"pid": 1, "url": "http://127.0.0.1:1"}')
    with (demo / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = await run_json("up --demo --detach")
    assert (running["url"], running["pid"], running["simulated"]) == ("http://127.0.0.1:1", 1, True)
    assert (await run_json("down"))["stopped"] == []
    untested.discard("loadtest")  # it handles signals, so it is tested as a process: tests/integration/test_loadtest.py
    assert not untested


def completed(words: str) -> list[str]:
    """Return the completions that bash gets for a command line."""
    index = str(words.count(" "))
    ended = command(_HYPERCORE_AGENTS_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=index)
    assert ended.code == 0, ended
    return ended.out.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("hypercore-agents doc", {"doctor"}),
        ("hypercore-agents keys r", {"remove", "reset", "rotate"}),
        ("hypercore-agents tokens create --sc", {"--scope"}),
        ("hypercore-agents tokens create x --scope u", {"user"}),
        ("hypercore-agents image ", {"build", "list", "verify", "prune"}),
    ],
)
def test_completion_covers_groups_options_and_values(words: str, offered: set[str]) -> None:
    assert set(completed(words)) == offered


def test_show_completion_prints_a_shell_script() -> None:
    shown = command("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").out
    assert "complete -o default -F" in shown
    assert "_HYPERCORE_AGENTS_COMPLETE=complete_bash" in shown


def test_the_list_of_commands_is_complete() -> None:
    assert {"spawn", "keys add", "config show", *SERVE} <= set(COMMANDS)
