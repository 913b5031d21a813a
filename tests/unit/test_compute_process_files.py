"""Records, exit files, logs and locks of the process backend, and the removal of files of a hostile agent."""

import asyncio
import json
import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from hypercore_agents.api.ids import new_agent_id
from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.host.identity import ProcessIdentity, identify, is_alive, pidfd_of
from hypercore_agents.compute.host.locks import AgentLocks
from hypercore_agents.compute.host.sandbox_directory import EXIT_BYTES
from hypercore_agents.compute.host.shims import BoundedLog, ExitFile
from hypercore_agents.compute.process.records import ProcessDirectory, ProcessExit, ProcessRecord
from hypercore_agents.kit.linux import removal
from hypercore_agents.kit.linux.removal import remove_tree
from support.process_backend import python_for_others

RECORD = ProcessRecord(
    agent_id="agent-0123456789abcdef",
    created_at=1.5,
    address="http://127.0.0.1:1",
    uid=1_900_000_000,
    memory_mb=512,
    cgroups=("/sys/fs/cgroup/x",),
    shim=ProcessIdentity(1, 2, "boot"),
    agent=ProcessIdentity(3, 4, "boot"),
)


@pytest.fixture
def directory(tmp_path: Path) -> ProcessDirectory:
    directory = ProcessDirectory(tmp_path / RECORD.agent_id)
    directory.create()
    return directory


def test_a_record_is_read_as_it_was_written(directory: ProcessDirectory) -> None:
    directory.write(RECORD)
    assert directory.read() == RECORD
    assert stat.S_IMODE(directory.record.stat().st_mode) == 0o600


def test_a_failed_write_leaves_the_old_record(directory: ProcessDirectory) -> None:
    directory.write(RECORD)
    with mock.patch.object(Path, "replace", side_effect=OSError(28, "full")), pytest.raises(OSError, match="full"):
        directory.write(replace(RECORD, address="http://127.0.0.1:2"))
    assert directory.read() == RECORD
    assert not (directory.path / "record.new").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"agent_id": 3}', "\xff", json.dumps({"shim": {}})])
def test_a_damaged_record_becomes_a_minimal_one(directory: ProcessDirectory, content: str) -> None:
    directory.record.write_bytes(content.encode("latin-1"))
    seen = directory.read()
    assert seen is not None
    assert (seen.agent_id, seen.address, seen.shim, seen.agent) == (RECORD.agent_id, "", None, None)


def test_a_record_of_an_earlier_release_is_read_with_defaults(directory: ProcessDirectory) -> None:
    value = json.loads(replace(RECORD, memory_mb=0).to_json()) | {"memory_mb": None}
    del value["cores"], value["origin"]
    directory.record.write_text(json.dumps(value))
    assert directory.read() == replace(RECORD, memory_mb=0)


def test_the_agent_id_of_a_record_is_that_of_its_directory(directory: ProcessDirectory) -> None:
    directory.write(replace(RECORD, agent_id="agent-fedcba9876543210"))
    seen = directory.read()
    assert seen is not None
    assert seen.agent_id == RECORD.agent_id


def test_a_foreign_record_names_no_process_user_or_group(directory: ProcessDirectory) -> None:
    directory.write(replace(RECORD, origin=directory.origin))
    assert directory.read() == replace(RECORD, origin=directory.origin)
    directory.write(replace(RECORD, origin=f"another:{directory.path.parent}"))
    seen = directory.read()
    assert seen is not None
    assert (seen.shim, seen.agent, seen.uid, seen.cgroups) == (None, None, None, ())


def test_a_missing_directory_has_no_record(tmp_path: Path) -> None:
    assert ProcessDirectory(tmp_path / "x").read() is None
    assert ProcessDirectory(tmp_path / "x").read_exit() is None
    assert list(ProcessDirectory.all_in(tmp_path / "x")) == []


def test_only_directories_are_sandboxes(directory: ProcessDirectory) -> None:
    (directory.path.parent / "file").touch()
    (directory.path.parent / "link").symlink_to(directory.path)
    assert [found.path for found in ProcessDirectory.all_in(directory.path.parent)] == [directory.path]


def test_the_exit_file_keeps_its_size(directory: ProcessDirectory) -> None:
    assert directory.read_exit() is None
    exit_file = ExitFile(str(directory.exit))
    for clean in (False, True):
        exit_file.write(status=-9, memory_kills=2**63, clean=clean)
        assert directory.exit.stat().st_size == EXIT_BYTES
        assert directory.read_exit() == ProcessExit(-9, 2**63, clean)


@pytest.mark.parametrize("content", ["", "[]", '{"status": "0"}', '{"status": 0}', "\0" * EXIT_BYTES])
def test_a_damaged_exit_file_is_ignored(directory: ProcessDirectory, content: str) -> None:
    directory.exit.write_text(content)
    assert directory.read_exit() is None


def test_a_log_continues_after_a_failed_write(directory: ProcessDirectory) -> None:
    log = BoundedLog(str(directory.log), 1000)
    with mock.patch("os.write", side_effect=OSError(28, "full")):
        log.write(b"lost")
    log.write(b"stored")
    assert directory.tail(100) == b"stored"


def test_a_log_that_cannot_be_rotated_starts_empty(directory: ProcessDirectory) -> None:
    log = BoundedLog(str(directory.log), 10)
    log.write(b"12345")
    with mock.patch("os.pread", side_effect=OSError(5, "cannot be read")):
        log.write(b"678")
    assert directory.tail(100) == b"678"


def test_a_log_in_rotation_is_not_read_twice(directory: ProcessDirectory) -> None:
    directory.log.write_bytes(b"once")
    directory.log.with_name("log.1").hardlink_to(directory.log)
    assert directory.tail(100) == b"once"


def test_a_tree_is_removed_and_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "kept").mkdir(parents=True)
    tree = tmp_path / "tree"
    (tree / "a" / "b" / "c").mkdir(parents=True)
    (tree / "a" / "file").touch()
    (tree / "a" / "b" / "up").symlink_to(outside)
    (tree / "link").symlink_to(outside / "kept")
    os.mkfifo(tree / "a" / "fifo")
    remove_tree(tree)
    assert sorted(tmp_path.rglob("*")) == [outside, outside / "kept"]


def test_a_link_in_place_of_the_tree_is_removed_without_its_target(tmp_path: Path) -> None:
    (tmp_path / "kept" / "below").mkdir(parents=True)
    (tmp_path / "tree").symlink_to(tmp_path / "kept")
    remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").is_symlink()
    assert (tmp_path / "kept" / "below").is_dir()
    remove_tree(tmp_path / "tree")


@pytest.mark.root
def test_a_tree_without_permissions_for_its_owner_is_removed(tmp_path: Path) -> None:
    others = python_for_others()
    if others is None:
        pytest.skip("needs a Python that other users may run")
    tree = tmp_path / "tree"
    program = (
        "import os, runpy, sys, pathlib\n"
        "code, tree = sys.stdin.read(), pathlib.Path(sys.argv[1])\n"
        "(tree / 'a' / 'b' / 'c').mkdir(parents=True)\n"
        "for path in ('a/b/c', 'a/b', 'a', ''): (tree / path).chmod(0)\n"
        "names = {'__name__': 'removal'}\n"
        "exec(code, names)\n"
        "names['remove_tree'](tree)\n"
    )
    for directory in (tmp_path, *tmp_path.parents[: len(tmp_path.parents) - 2]):
        directory.chmod(directory.stat().st_mode | 0o055)
    tmp_path.chmod(0o777)
    answer = subprocess.run(
        [others, "-I", "-c", program, str(tree)],
        input=Path(removal.__file__).read_text(),
        text=True,
        capture_output=True,
        user=1_900_040_000,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert not tree.exists()


def test_a_tree_that_cannot_be_removed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tree" / "a" / "b").mkdir(parents=True)
    with mock.patch("os.rmdir", side_effect=OSError(16, "busy")), pytest.raises(OSError, match="busy"):
        remove_tree(tmp_path / "tree")


async def test_a_lock_excludes_another_process_and_leaves_no_file(tmp_path: Path) -> None:
    ours, theirs = AgentLocks(tmp_path), AgentLocks(tmp_path, patience=0.05)
    agent_id = new_agent_id()
    assert not ours.is_held(agent_id)
    async with ours.hold(agent_id):
        assert theirs.is_held(agent_id)
        with pytest.raises(SandboxError, match="another process has held the lock of"):
            async with theirs.hold(agent_id):
                pytest.fail("the lock was held twice")
        async with theirs.hold(new_agent_id()):
            assert theirs.is_held(agent_id)
    assert list(tmp_path.iterdir()) == []
    assert not theirs.is_held(agent_id)


async def test_a_lock_has_one_holder_at_a_time(tmp_path: Path) -> None:
    managers = [AgentLocks(tmp_path) for _ in range(2)]
    agent_id = new_agent_id()
    inside = 0

    async def work(locks: AgentLocks) -> None:
        nonlocal inside
        async with locks.hold(agent_id):
            inside += 1
            assert inside == 1
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(work(managers[number % 2]) for number in range(20)))
    assert list(tmp_path.iterdir()) == []


async def test_the_error_of_a_lock_has_its_reason(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="cannot lock agent-0: No such file or directory"):
        async with AgentLocks(tmp_path / "missing").hold("agent-0"):
            pytest.fail("the lock was acquired")


def test_an_identity_matches_only_its_own_process() -> None:
    own = identify(os.getpid())
    assert own is not None
    assert is_alive(own)
    assert not is_alive(replace(own, started=own.started + 1))
    assert not is_alive(replace(own, boot="another"))
    with pidfd_of(own) as pidfd:
        assert pidfd is not None
    for stranger in (None, replace(own, started=own.started + 1)):
        with pidfd_of(stranger) as pidfd:
            assert pidfd is None


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    identity = identify(child.pid)
    assert identity is not None
    assert not is_alive(identity)
    child.wait()
    assert identify(child.pid) is None


@pytest.mark.parametrize("value", [3, "x", {}, {"pid": 1}, {"pid": "1", "started": 2, "boot": "b"}])
def test_an_invalid_identity_is_rejected(value: object) -> None:
    with pytest.raises(ValueError, match="a process must be"):
        ProcessIdentity.from_json(value)
