"""The file that sessions run as their Claude CLI, and the paths that they can read for it."""

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from hypercore_agents.agent.launcher.claude_cli import session_cli

pytestmark = pytest.mark.root


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "installed" / "claude"
    path.parent.mkdir()
    path.write_bytes(Path("/bin/true").read_bytes())
    path.chmod(0o755)
    return path


def test_agents_share_one_executable_unreadable_copy(program: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    found = []
    starts = [
        threading.Thread(
            target=lambda: found.append(session_cli({"CLAUDE_CLI_PATH": str(program)}, (str(store), "/none")))
        )
        for _ in range(4)
    ]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    (copy,) = store.iterdir()
    assert {cli.shown for cli in found} == {str(copy)}
    assert {(str(program) in cli.names, cli.exposed) for cli in found} == {(True, ())}
    assert (copy.stat().st_uid, copy.stat().st_mode & 0o7777) == (0, 0o711)
    assert copy.read_bytes() == program.read_bytes()
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder.stat().st_mode & 0o001 == 0:
            folder.chmod(0o711)
    store.chmod(0o755)
    as_nobody = {"user": 65534, "group": 65534, "extra_groups": (), "check": False}
    assert subprocess.run([copy], **as_nobody).returncode == 0  # type: ignore[call-overload]
    refused = subprocess.run(["cat", copy], capture_output=True, **as_nobody)  # type: ignore[call-overload]
    assert b"Permission denied" in refused.stderr


def test_each_version_has_a_copy_and_unused_copies_are_removed(program: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    environment = {"CLAUDE_CLI_PATH": str(program)}
    first = session_cli(environment, (str(store),))
    old = first.shown
    assert old is not None
    assert first.lock is not None
    os.utime(old, (time.time() - 20 * 86400,) * 2)
    program.write_bytes(Path("/bin/false").read_bytes())
    new = session_cli(environment, (str(store),)).shown
    assert {str(path) for path in store.iterdir()} == {old, new}, "a running launcher shows the old copy to sessions"
    os.close(first.lock)  # that launcher has ended
    program.write_bytes(Path("/bin/echo").read_bytes())
    newest = session_cli(environment, (str(store),)).shown
    assert {str(path) for path in store.iterdir()} == {new, newest}
    assert len({old, new, newest}) == 3


def test_a_truncated_or_changed_copy_is_replaced(program: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    copy = session_cli({"CLAUDE_CLI_PATH": str(program)}, (str(store),)).shown
    assert copy is not None
    for damage in ("truncate -s 100", "chmod 755", "chown 1:1"):
        subprocess.run([*damage.split(), copy], check=True)
        assert session_cli({"CLAUDE_CLI_PATH": str(program)}, (str(store),)).shown == copy
        found = os.stat(copy)
        assert (found.st_size, found.st_uid, found.st_mode & 0o7777) == (program.stat().st_size, 0, 0o711)


def test_the_next_store_is_used_if_one_fails(program: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    stores = (str(tmp_path / "file" / "store"), str(tmp_path / "own"))
    shown = session_cli({"CLAUDE_CLI_PATH": str(program)}, stores).shown
    assert shown is not None
    assert Path(shown).parent == tmp_path / "own"


def test_an_execute_only_program_is_not_copied(program: Path, tmp_path: Path) -> None:
    program.chmod(0o711)
    assert session_cli({"CLAUDE_CLI_PATH": str(program)}, (str(tmp_path / "store"),)).shown == str(program)
    assert not (tmp_path / "store").exists()


def test_a_script_is_shown_with_only_its_package(tmp_path: Path) -> None:
    package = tmp_path / "node_modules" / "@anthropic-ai" / "claude-code"
    (package / "bin").mkdir(parents=True)
    (package / "package.json").write_text("{}")
    alone = tmp_path / "claude"
    for script in (package / "bin" / "cli.js", alone):
        script.write_text("#!/usr/bin/node\n")
    for script, exposed in ((package / "bin" / "cli.js", package), (alone, alone)):
        found = session_cli({"CLAUDE_CLI_PATH": str(script)}, (str(tmp_path / "store"),))
        assert (found.shown, found.names, found.exposed) == (None, frozenset(), (str(exposed),))
