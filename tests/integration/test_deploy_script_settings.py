"""The deploy script and the program read STATE_DIR from `.env` with the same parser."""

import os
import subprocess
from pathlib import Path

import pytest

from support.command_line import command

SCRIPT = Path(__file__).parents[2] / "scripts" / "deploy-claude-agents.sh"


@pytest.mark.parametrize(
    "line",
    [
        b'STATE_DIR="{}"',
        b"export STATE_DIR='{}'",
        b"STATE_DIR={} # where state lies",
        b"STATE_DIR={}\r",
        b"\xef\xbb\xbfSTATE_DIR={}",
        b"state_dir={}",
        b"STATE_DIR=${HOME}/folder",
        b"STATE_DIR=\nSTATE_DIR={}",
    ],
)
def test_the_script_and_the_program_use_the_same_state_folder(
    line: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "scripts").mkdir(parents=True)
    for name in ("deploy-claude-agents.sh", "bootstrap.sh"):
        (checkout / "scripts" / name).write_bytes(SCRIPT.with_name(name).read_bytes())
    program = checkout / ".venv" / "bin" / "hypercore-agents"
    program.parent.mkdir(parents=True)
    python = Path(os.sys.executable)  # type: ignore[attr-defined]
    # The real program runs `config get`; the other command only prints the folder that it received.
    program.write_text(
        f'#!/bin/sh\nif [ "$1" = config ]; then exec {python} -m hypercore_agents "$@"; fi\nprintf %s "$STATE_DIR"\n'
    )
    program.chmod(0o755)
    folder = tmp_path / "home" / "folder"
    (checkout / ".env").write_bytes(line.replace(b"{}", os.fsencode(folder)) + b"\n")
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "PYTHONPATH": str(SCRIPT.parents[1] / "src"),
        "STATE_DIR": "",
    }  # fmt: skip
    shown = subprocess.run(
        ["bash", checkout / "scripts" / SCRIPT.name, "--stop"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (shown.returncode, shown.stdout) == (0, str(folder)), shown.stderr
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert command("config", "get", "STATE_DIR", STATE_DIR="").out == f"{folder}\n"


@pytest.mark.parametrize(("mode", "tightened"), [(0o644, True), (0o600, False)])
def test_the_script_makes_the_settings_file_private(mode: int, tightened: bool, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    script = SCRIPT.read_text()
    # Exit before the script installs or starts anything.
    (tmp_path / "scripts" / SCRIPT.name).write_text(script.replace("bootstrap requirements/runtime.lock", "exit 0"))
    (tmp_path / "scripts" / "bootstrap.sh").write_bytes(SCRIPT.with_name("bootstrap.sh").read_bytes())
    settings = tmp_path / ".env"
    settings.write_text("ANTHROPIC_API_KEY=x\n")
    settings.chmod(mode)
    done = subprocess.run(
        ["bash", tmp_path / "scripts" / SCRIPT.name, "--demo"], capture_output=True, text=True, check=True
    )
    assert settings.stat().st_mode & 0o777 == 0o600
    assert (f"{settings} readable only by its owner" in done.stderr) is tightened


def test_config_get_rejects_secrets_and_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, why in (("JWT_SECRET", "is a secret"), ("NONSENSE", "is not a setting")):
        refused = command("config", "get", name, JWT_SECRET="x" * 40)
        assert (refused.code, why in refused.err, "x" * 40 in refused.err) == (2, True, False)
    assert command("config", "get", "STATE_DIR", "--default", "/elsewhere", STATE_DIR=None).out == "/elsewhere\n"
