"""Separate users: when agents can have them, and that no two sandboxes share one."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from hypercore_agents.compute.base import InsufficientResources
from hypercore_agents.compute.host import users
from hypercore_agents.compute.host.users import AgentUsers, closed_component, why_no_separate_users

UIDS = range(1_900_030_000, 1_900_030_003)


def sandboxes(place: Path, count: int) -> list[Path]:
    paths = [place / f"sandbox{number}" for number in range(count)]
    for path in paths:
        path.mkdir()
    return paths


def test_each_sandbox_gets_its_own_user(tmp_path: Path) -> None:
    managers = [AgentUsers(UIDS, tmp_path / "uids") for _ in range(2)]
    claimed = [managers[number % 2].claim(path) for number, path in enumerate(sandboxes(tmp_path, 3))]
    assert sorted(claimed) == list(UIDS)
    with pytest.raises(InsufficientResources, match="agents use all 3 users from 1900030000"):
        managers[0].claim(tmp_path / "another")


def test_a_released_user_is_free_again(tmp_path: Path) -> None:
    pool = AgentUsers(UIDS, tmp_path / "uids")
    first, second, third = sandboxes(tmp_path, 3)
    claimed = [pool.claim(path) for path in (first, second, third)]
    pool.release(claimed[1], second)
    pool.release(claimed[1], second)
    assert pool.claim(second) == claimed[1]


def test_a_user_is_released_only_by_its_sandbox(tmp_path: Path) -> None:
    pool = AgentUsers(UIDS[:1], tmp_path / "uids")
    mine, other = sandboxes(tmp_path, 2)
    uid = pool.claim(mine)
    pool.release(uid, other)
    with pytest.raises(InsufficientResources):
        pool.claim(other)


def test_the_user_of_a_deleted_directory_is_free_once_it_has_no_processes(tmp_path: Path) -> None:
    pool = AgentUsers(UIDS[:1], tmp_path / "uids")
    deleted, other = sandboxes(tmp_path, 2)
    uid = pool.claim(deleted)
    deleted.rmdir()
    with mock.patch.object(users, "processes_of", return_value=iter([4711])), pytest.raises(InsufficientResources):
        pool.claim(other)
    assert pool.claim(other) == uid


def test_a_failed_write_leaves_no_claim(tmp_path: Path) -> None:
    pool = AgentUsers(UIDS, tmp_path / "uids")
    (sandbox,) = sandboxes(tmp_path, 1)

    def half(path: Path, _: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    with mock.patch.object(Path, "write_text", half), pytest.raises(OSError, match="No space"):
        pool.claim(sandbox)
    assert list((tmp_path / "uids").iterdir()) == []


def test_processes_are_found_by_their_user() -> None:
    assert os.getpid() in users.processes_of(os.geteuid())
    assert list(users.processes_of(UIDS[0])) == []


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that every user can reach."""
    with tempfile.TemporaryDirectory(prefix="hypercore-test-") as name:
        Path(name).chmod(0o755)
        closed = closed_component(Path(name))
        if closed:
            pytest.skip(f"needs a temporary directory that others can pass: {closed} is closed")
        yield Path(name)


def test_a_path_that_others_can_read_is_not_closed(reachable: Path) -> None:
    (reachable / "file").touch(0o644)
    (reachable / "through").symlink_to(".")
    assert closed_component(reachable / "through" / "file") is None


def test_the_first_closed_directory_is_named(reachable: Path) -> None:
    (reachable / "closed").mkdir(mode=0o700)
    (reachable / "closed" / "below").mkdir(mode=0o755)
    assert closed_component(reachable / "closed" / "below" / "file") == reachable / "closed"


def test_a_file_that_others_cannot_read_is_named(reachable: Path) -> None:
    (reachable / "file").touch(0o600)
    assert closed_component(reachable / "file") == reachable / "file"


@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_to_a_closed_target_is_closed(reachable: Path, absolute: bool) -> None:
    (reachable / "closed").mkdir(mode=0o700)
    (reachable / "closed" / "python").touch(0o755)
    (reachable / "bin").mkdir()
    target = reachable / "closed" / "python" if absolute else Path("../closed/python")
    (reachable / "bin" / "python").symlink_to(target)
    closed = closed_component(reachable / "bin" / "python")
    assert closed is not None
    assert closed.samefile(reachable / "closed")


def test_a_missing_path_is_checked_as_far_as_it_exists(reachable: Path) -> None:
    assert closed_component(reachable / "no" / "such" / "path") is None
    reachable.chmod(0o700)
    assert closed_component(reachable / "no" / "such" / "path") == reachable


def test_a_link_to_itself_is_closed(reachable: Path) -> None:
    (reachable / "loop").symlink_to(reachable / "loop")
    assert closed_component(reachable / "loop") == reachable / "loop"


def test_the_reason_names_the_missing_privilege(tmp_path: Path) -> None:
    assert why_no_separate_users(None, tmp_path, []) == "separate users are switched off"
    with mock.patch("os.geteuid", return_value=1000):
        assert why_no_separate_users(UIDS, tmp_path, []) == "the manager is not root"
    with mock.patch("os.geteuid", return_value=0), mock.patch.object(users, "_effective_capabilities", return_value=0):
        assert why_no_separate_users(UIDS, tmp_path, []) == "the manager is not root"


@pytest.mark.root
def test_the_reason_for_root_names_the_obstacle(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    reason = why_no_separate_users(UIDS, tmp_path, [closed / "state"])
    assert reason is not None
    assert reason.endswith("is closed to other users")
    with mock.patch.object(users, "_is_mapped", return_value=False):
        assert why_no_separate_users(UIDS, tmp_path, []) == (
            "users from 1900030000 do not exist in this user namespace"
        )
    claims = tmp_path / "file"
    claims.touch()
    assert why_no_separate_users(UIDS, claims / "uids", []) == f"{claims / 'uids'} cannot be created: Not a directory"
    assert why_no_separate_users(UIDS, tmp_path / "uids", [Path("/usr/bin/env")]) is None
