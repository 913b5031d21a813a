"""Incomplete files that a killed upload leaves in a workspace. Runs `workspace_files` as the agent does."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from hypercore_agents.agent.launcher import workspace_files
from hypercore_agents.agent.launcher.protocol import pack_command
from hypercore_agents.agent.launcher.workspace_files import LEFTOVER_SECONDS

_LIMIT = str(1 << 20)


def work(workspace: Path, *words: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-I", "-m", workspace_files.__name__, str(workspace), *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def listed(workspace: Path) -> list[str]:
    out, _ = work(workspace, "list", "", "100").communicate(timeout=30)
    entries = out.partition(b"\n")[2].split(b"\0")[:-1]
    return [entry.split(b"\t")[3].decode() for entry in entries]


@pytest.fixture
def leftover(tmp_path: Path) -> Path:
    """The incomplete file in `root/work/sub` of a writer that was killed."""
    workspace = tmp_path / "root" / "work"
    (workspace / "sub").mkdir(parents=True)
    with work(workspace, "write", "sub/file", _LIMIT) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        assert writer.stdout.readline() == b'{"ready": true}\n'
        writer.stdin.write((1000).to_bytes(4, "big") + b"half")
        writer.stdin.flush()
        writer.kill()
    (left,) = (workspace / "sub").iterdir()
    assert left.name.startswith(".incoming.")
    return left


def age(path: Path) -> None:
    written = path.stat().st_mtime - LEFTOVER_SECONDS - 1
    os.utime(path, (written, written))


def test_a_list_omits_incomplete_files_and_deletes_old_ones(leftover: Path) -> None:
    workspace = leftover.parents[1]
    assert listed(workspace) == ["sub"]
    assert leftover.exists(), "its writer may still run"
    age(leftover)
    assert listed(workspace) == ["sub"]
    assert not leftover.exists()


def test_a_write_deletes_old_incomplete_files_in_its_folder(leftover: Path) -> None:
    workspace = leftover.parents[1]
    users_file = leftover.with_name(".incoming.notes")
    users_file.write_text("a user's own file")
    for path in (leftover, users_file):
        age(path)
    out, _ = work(workspace, "write", "sub/file", _LIMIT).communicate((4).to_bytes(4, "big") + b"new!" + bytes(4), 30)
    assert out.endswith(b'{"size": 4}\n')
    assert sorted(path.name for path in leftover.parent.iterdir()) == [".incoming.notes", "file"]
    assert listed(workspace) == ["sub", "sub/.incoming.notes", "sub/file"]


def test_archives_omit_incomplete_files(leftover: Path, tmp_path: Path) -> None:
    (leftover.parent / "file").write_text("whole")
    for name in ("projects", "plans", "tasks", "todos"):
        (tmp_path / "root/config" / name).mkdir(parents=True)
    archive = tmp_path / "archive"
    with archive.open("wb") as out:
        subprocess.run(pack_command(str(tmp_path / "root")), cwd=leftover.parents[1], stdout=out, check=True)
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    assert any(name.endswith("sub/file") for name in names)
    assert not [name for name in names if ".incoming." in name]
