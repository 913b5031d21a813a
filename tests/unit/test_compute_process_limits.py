"""Where control groups are found, and what is written into them."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from hypercore_agents.api.ids import new_agent_id
from hypercore_agents.kit.linux import cgroups as limits
from hypercore_agents.kit.linux.cgroups import Cgroups, Limits, detect
from support.process_backend import no_limits

LIMITS = Limits(cores=2, memory_mb=256, processes=100)


@pytest.fixture
def process(tmp_path: Path) -> Path:
    directory = tmp_path / "proc"
    directory.mkdir()
    return directory


def describe(process: Path, groups: str, *mounts: str) -> None:
    (process / "cgroup").write_text(groups)
    (process / "mountinfo").write_text("".join(f"31 23 0:28 {mount}\n" for mount in mounts))


def version_1(tmp_path: Path, *controllers: str, root: str = "/", below: str = "") -> list[str]:
    for controller in controllers:
        (tmp_path / controller / below).mkdir(parents=True)
    return [f"{root} {tmp_path / name} rw,relatime - cgroup cgroup rw,{name}" for name in controllers]


def version_2(base: Path, controllers: str) -> str:
    (base / "cgroup.subtree_control").write_text(controllers)
    return f"/ {base} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"


def test_version_1_creates_groups_below_the_managers_group(tmp_path: Path, process: Path) -> None:
    mounts = version_1(tmp_path, "cpu,cpuacct", "memory", "pids", "freezer", below="slice/manager")
    describe(process, "5:cpu,cpuacct:/slice/manager\n4:memory:/slice/manager\n2:pids:/elsewhere\n", *mounts)
    groups = detect(process)
    assert groups is not None
    assert groups.enforced == {"cores", "memory", "pids"}
    assert groups.paths("x") == (
        str(tmp_path / "cpu,cpuacct/slice/manager/x"),
        str(tmp_path / "memory/slice/manager/x"),
        # Not visible below this mount, so the root of the mount.
        str(tmp_path / "pids/x"),
    )


def test_a_mount_of_a_subtree_is_resolved_from_its_root(tmp_path: Path, process: Path) -> None:
    mounts = version_1(tmp_path, "memory", root="/docker/abc", below="manager")
    describe(process, "4:memory:/docker/abc/manager\n", *mounts)
    groups = detect(process)
    assert groups is not None
    assert groups.paths("x") == (str(tmp_path / "memory/manager/x"),)
    assert groups.enforced == {"memory"}


def test_a_group_outside_the_namespace_stays_in_the_mount(tmp_path: Path, process: Path) -> None:
    describe(process, "4:memory:/../..\n", *version_1(tmp_path, "memory"))
    groups = detect(process)
    assert groups is not None
    assert groups.paths("x") == (str(tmp_path / "memory/x"),)


def test_version_2_enforces_the_enabled_controllers(tmp_path: Path, process: Path) -> None:
    describe(process, "0::/\n", version_2(tmp_path, "cpuset cpu memory"))
    with mock.patch.object(limits, "_write"):
        groups = detect(process)
    assert groups is not None
    assert groups.enforced == {"cores", "memory"}
    assert groups.paths("x") == (str(tmp_path / "x"),)


def test_version_2_uses_the_parent_of_a_group_with_processes(tmp_path: Path, process: Path) -> None:
    own = tmp_path / "service" / "manager"
    own.mkdir(parents=True)
    mount = version_2(tmp_path, "")
    (own / "cgroup.subtree_control").write_text("")
    (own.parent / "cgroup.subtree_control").write_text("cpu memory pids")
    describe(process, "0::/service/manager\n", mount)
    with mock.patch.object(limits, "_write", side_effect=OSError(errno.EBUSY, "busy")):
        groups = detect(process)
    assert groups is not None
    assert groups.paths("x") == (str(own.parent / "x"),)
    assert groups.enforced == {"cores", "memory", "pids"}


@pytest.mark.parametrize("refusal", [errno.EROFS, errno.EACCES])
def test_no_limits_without_writable_groups(tmp_path: Path, process: Path, refusal: int) -> None:
    describe(process, "4:memory:/\n0::/\n", *version_1(tmp_path, "memory"), version_2(tmp_path, "memory"))
    with mock.patch.object(Path, "mkdir", side_effect=OSError(refusal, os.strerror(refusal))):
        assert detect(process) is None


def test_a_host_without_control_groups_limits_nothing(process: Path) -> None:
    describe(process, "", "/ / rw - ext4 /dev/vda rw")
    assert detect(process) is None


@pytest.fixture
def written() -> Iterator[dict[str, int | str]]:
    """The written values by file name; the kernel's files do not exist here."""
    seen: dict[str, int | str] = {}
    with mock.patch.object(limits, "_write", side_effect=lambda path, value: seen.update({path.name: value})):
        yield seen


def test_version_1_writes_its_files(tmp_path: Path, written: dict[str, int | str]) -> None:
    Cgroups(dict.fromkeys(("cpu", "memory", "pids"), tmp_path), limits.settings_of_version_1).create("x", LIMITS)
    assert written == {
        "cpu.cfs_period_us": 100_000,
        "cpu.cfs_quota_us": 200_000,
        "memory.limit_in_bytes": 256 * 2**20,
        "memory.memsw.limit_in_bytes": 256 * 2**20,
        "pids.max": 100,
    }


def test_version_2_writes_its_files(tmp_path: Path, written: dict[str, int | str]) -> None:
    Cgroups(dict.fromkeys(("cpu", "memory", "pids"), tmp_path), limits.settings_of_version_2).create("x", LIMITS)
    assert written == {
        "cpu.max": "200000 100000",
        "memory.max": 256 * 2**20,
        "memory.swap.max": 0,
        "pids.max": 100,
    }


@pytest.mark.parametrize(
    ("file", "refusal", "fine"),
    [
        ("cpu.cfs_quota_us", errno.EINVAL, True),
        ("cpu.cfs_quota_us", errno.EACCES, False),
        ("memory.memsw.limit_in_bytes", errno.ENOENT, True),
        ("memory.limit_in_bytes", errno.ENOENT, False),
        ("pids.max", errno.EINVAL, False),
    ],
)
def test_a_rejected_limit_fails_a_start(tmp_path: Path, file: str, refusal: int, fine: bool) -> None:
    def write(path: Path, value: object) -> None:
        if path.name == file:
            raise OSError(refusal, os.strerror(refusal))

    groups = Cgroups({"cpu": tmp_path, "memory": tmp_path, "pids": tmp_path / "other"}, limits.settings_of_version_1)
    (tmp_path / "other").mkdir()
    with mock.patch.object(limits, "_write", side_effect=write):
        if fine:
            groups.create("x", LIMITS)
        else:
            with pytest.raises(OSError, match=os.strerror(refusal)):
                groups.create("x", LIMITS)
    assert [Path(path).is_dir() for path in groups.paths("x")] == [fine, fine]


def test_a_group_that_stays_busy_is_an_error_after_the_timeout(tmp_path: Path) -> None:
    with (
        mock.patch("os.rmdir", side_effect=OSError(errno.EBUSY, "busy")) as removing,
        pytest.raises(OSError, match="busy"),
    ):
        limits.remove([str(tmp_path / "x")], patience=0.02)
    assert removing.call_count > 1


def test_missing_groups_have_no_members_and_need_no_removal(tmp_path: Path) -> None:
    assert limits.members([str(tmp_path / "x")]) == set()
    limits.remove([str(tmp_path / "x")], patience=0)


@pytest.mark.root
@pytest.mark.skipif(no_limits() is not None, reason=str(no_limits()))
def test_the_kernel_accepts_the_limits() -> None:
    groups = detect()
    assert groups is not None
    name = f"hypercore-test-{new_agent_id()}"
    groups.create(name, LIMITS)
    try:
        read = {file.name: file.read_text().strip() for path in groups.paths(name) for file in Path(path).glob("*.max")}
        assert read["pids.max"] == "100"
        memory = [Path(path, file) for path in groups.paths(name) for file in ("memory.limit_in_bytes", "memory.max")]
        assert [file.read_text().strip() for file in memory if file.exists()] == [str(256 * 2**20)]
    finally:
        limits.remove(groups.paths(name), patience=1)
    assert not any(Path(path).exists() for path in groups.paths(name))
