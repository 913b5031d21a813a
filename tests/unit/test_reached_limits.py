"""Finds the limit that ended or refused a process, from control group files as the different kernels write them."""

from pathlib import Path

import pytest

from hypercore_agents.agent.launcher.reached_limits import (
    Level,
    LimitCounters,
    memory_limit,
    processes_limit,
    read_counters,
)

NAMES = ("session", "user", "all sessions")
LIMITS_MB, LIMITS = (300, 460, 768), (40, 100, 224)
MB = 1 << 20


class Groups:
    """A session's group in its user's group in the group of all sessions, as plain files."""

    def __init__(self, root: Path) -> None:
        self.folders = [root / "sessions/user/session", root / "sessions/user", root / "sessions"]
        self.folders[0].mkdir(parents=True)
        self.since = LimitCounters("session")

    def write(self, file: str, *values: int, key: str = "") -> None:
        """Write a file of each level; a value with a key gets other lines around it."""
        for folder, value in zip(self.folders, values, strict=False):
            (folder / file).write_text(f"low 0\n{key} {value}\noom_group_kill 0\n" if key else f"{value}\n")

    def _read_counters(self) -> tuple[LimitCounters, LimitCounters]:
        since, self.since = self.since, read_counters("session", self.folders, self.folders)
        return since, self.since

    def memory(self) -> str | None:
        levels = [Level(*level) for level in zip(self.folders, (mb * MB for mb in LIMITS_MB), NAMES, strict=True)]
        return memory_limit(levels, *self._read_counters(), "outside")

    def processes(self) -> str | None:
        levels = [Level(*level) for level in zip(self.folders, LIMITS, NAMES, strict=True)]
        return processes_limit(levels, *self._read_counters())


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


def version_2_memory(groups: Groups, kills: tuple[int, int, int], ooms: tuple[int, int, int]) -> None:
    """Write the counters: `memory.events` includes child groups, `.local` counts the group whose limit was reached."""
    groups.write("memory.events", *kills, key="oom_kill")
    groups.write("memory.events.local", *ooms, key="oom")


@pytest.mark.parametrize("level", range(3))
def test_version_2_names_the_group_that_ran_out_of_memory(groups: Groups, level: int) -> None:
    # Peaks do not decide: the session reached its own limit earlier.
    groups.write("memory.peak", *(mb * MB for mb in LIMITS_MB))
    version_2_memory(groups, (2, 5, 9), (2, 3, 4))
    groups.memory()  # earlier counts
    version_2_memory(groups, (2, 5, 9), (2, 3, 4))
    assert groups.memory() is None
    ooms = [2, 3, 4]
    ooms[level] += 1
    version_2_memory(groups, (3, 6, 10), (ooms[0], ooms[1], ooms[2]))
    assert groups.memory() == NAMES[level]
    assert groups.memory() is None, "it is reported once"


def test_version_2_ignores_kills_in_another_session(groups: Groups) -> None:
    version_2_memory(groups, (0, 0, 0), (0, 0, 0))
    assert groups.memory() is None
    version_2_memory(groups, (0, 1, 1), (0, 1, 0))
    assert groups.memory() is None
    # Killed later, by its own limit: earlier counts of the user's group do not matter.
    version_2_memory(groups, (1, 2, 2), (1, 1, 0))
    assert groups.memory() == "session"


def test_version_2_distinguishes_the_hosts_memory(groups: Groups) -> None:
    groups.write("memory.peak", 100 * MB, 200 * MB, 300 * MB)
    version_2_memory(groups, (1, 1, 1), (0, 0, 0))
    assert groups.memory() == "outside"


@pytest.mark.parametrize("file", ["memory.peak", "memory.max_usage_in_bytes"])
@pytest.mark.parametrize(
    ("peaks", "named"),
    [
        ((299, 310, 320), "session"),
        ((200, 460, 700), "user"),
        ((200, 300, 768), "all sessions"),
        ((200, 300, 700), "outside"),
    ],
)
def test_without_local_events_the_innermost_full_group_is_named(
    groups: Groups, file: str, peaks: tuple[int, int, int], named: str
) -> None:
    groups.write("memory.oom_control" if "max" in file else "memory.events", 1, 1, 1, key="oom_kill")
    groups.write(file, *(peak * MB for peak in peaks))
    assert groups.memory() == named


@pytest.mark.parametrize("level", range(3))
def test_linux_6_11_names_the_group_that_ran_out_of_processes(groups: Groups, level: int) -> None:
    peaks = [20, 60, 150]
    peaks[level] = LIMITS[level]
    groups.write("pids.peak", *peaks)
    local = [0, 0, 0]
    groups.write("pids.events.local", *local, key="max")
    assert groups.processes() is None
    local[level] = 1
    groups.write("pids.events.local", *local, key="max")
    # `pids.events` includes child groups.
    groups.write("pids.events", *(int(level <= each) for each in range(3)), key="max")
    assert groups.processes() == NAMES[level]
    assert groups.processes() is None, "it is reported once"


def test_linux_6_11_ignores_limits_of_another_session(groups: Groups) -> None:
    groups.write("pids.peak", 20, 60, 150)
    groups.write("pids.events.local", 0, 0, 0, key="max")
    groups.write("pids.events", 0, 1, 1, key="max")  # another session of the user reached its own limit
    assert groups.processes() is None


def test_a_mount_with_local_events_counts_in_the_session(groups: Groups) -> None:
    for file in ("pids.events", "pids.events.local"):
        groups.write(file, 1, 0, 0, key="max")
    groups.write("pids.peak", 20, LIMITS[1], 150)
    assert groups.processes() == "user"


@pytest.mark.parametrize(
    ("now", "named"), [((40, 60, 80), "session"), ((20, 99, 110), "user"), ((20, 60, 224), "all sessions")]
)
def test_before_linux_6_11_the_fullest_group_is_named(groups: Groups, now: tuple[int, int, int], named: str) -> None:
    """There is no `pids.peak`, and the session's counter counts whichever limit was reached."""
    groups.write("pids.current", *now)
    groups.write("pids.events", 0, 0, 0, key="max")
    assert groups.processes() is None
    groups.write("pids.events", 3, 0, 0, key="max")
    assert groups.processes() == named
    assert groups.processes() is None


@pytest.mark.parametrize(("peaks", "named"), [((40, 60, 80), "session"), ((20, 100, 110), "user")])
def test_version_1_names_the_group_by_its_peak(groups: Groups, peaks: tuple[int, int, int], named: str) -> None:
    groups.write("pids.peak", *peaks)
    groups.write("pids.events", 1, 0, 0, key="max")
    assert groups.processes() == named
