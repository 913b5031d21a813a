"""Which limit ended or refused a process, by the files of control groups as each kernel writes them."""

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
    """A session's group within its user's within that of all sessions, with files instead of the kernel's."""

    def __init__(self, place: Path) -> None:
        self.folders = [place / "sessions/user/session", place / "sessions/user", place / "sessions"]
        self.folders[0].mkdir(parents=True)
        self.since = LimitCounters("session")

    def write(self, file: str, *values: int, key: str = "") -> None:
        """Write a file of each level, with other lines around one that has a key."""
        for folder, value in zip(self.folders, values, strict=False):
            (folder / file).write_text(f"low 0\n{key} {value}\noom_group_kill 0\n" if key else f"{value}\n")

    def _counted(self) -> tuple[LimitCounters, LimitCounters]:
        since, self.since = self.since, read_counters("session", self.folders, self.folders)
        return since, self.since

    def memory(self) -> str | None:
        levels = [Level(*level) for level in zip(self.folders, (mb * MB for mb in LIMITS_MB), NAMES, strict=True)]
        return memory_limit(levels, *self._counted(), "outside")

    def processes(self) -> str | None:
        levels = [Level(*level) for level in zip(self.folders, LIMITS, NAMES, strict=True)]
        return processes_limit(levels, *self._counted())


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


def version_2_memory(groups: Groups, kills: tuple[int, int, int], ooms: tuple[int, int, int]) -> None:
    """`memory.events` counts what is below as well; `.local` counts the group whose limit was reached."""
    groups.write("memory.events", *kills, key="oom_kill")
    groups.write("memory.events.local", *ooms, key="oom")


@pytest.mark.parametrize("level", range(3))
def test_version_2_names_the_group_whose_memory_was_used_up(groups: Groups, level: int) -> None:
    # Peaks do not decide: the session's is at its limit since long before.
    groups.write("memory.peak", *(mb * MB for mb in LIMITS_MB))
    version_2_memory(groups, (2, 5, 9), (2, 3, 4))
    groups.memory()  # what was counted before
    version_2_memory(groups, (2, 5, 9), (2, 3, 4))
    assert groups.memory() is None
    ooms = [2, 3, 4]
    ooms[level] += 1
    version_2_memory(groups, (3, 6, 10), (ooms[0], ooms[1], ooms[2]))
    assert groups.memory() == NAMES[level]
    assert groups.memory() is None, "it is said once"


def test_version_2_names_no_limit_when_a_process_of_another_session_was_killed(groups: Groups) -> None:
    version_2_memory(groups, (0, 0, 0), (0, 0, 0))
    assert groups.memory() is None
    version_2_memory(groups, (0, 1, 1), (0, 1, 0))
    assert groups.memory() is None
    # Killed later, for its own limit: what the user's group counted before is no reason.
    version_2_memory(groups, (1, 2, 2), (1, 1, 0))
    assert groups.memory() == "session"


def test_version_2_tells_the_hosts_memory_from_the_sessions(groups: Groups) -> None:
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
def test_version_2_from_linux_6_11_names_the_group_whose_processes_ran_out(groups: Groups, level: int) -> None:
    peaks = [20, 60, 150]
    peaks[level] = LIMITS[level]
    groups.write("pids.peak", *peaks)
    local = [0, 0, 0]
    groups.write("pids.events.local", *local, key="max")
    assert groups.processes() is None
    local[level] = 1
    groups.write("pids.events.local", *local, key="max")
    # `pids.events` counts what is below too.
    groups.write("pids.events", *(int(level <= each) for each in range(3)), key="max")
    assert groups.processes() == NAMES[level]
    assert groups.processes() is None, "it is said once"


def test_version_2_from_linux_6_11_names_no_limit_that_another_session_reached(groups: Groups) -> None:
    groups.write("pids.peak", 20, 60, 150)
    groups.write("pids.events.local", 0, 0, 0, key="max")
    groups.write("pids.events", 0, 1, 1, key="max")  # another session of the user reached its own limit
    assert groups.processes() is None


def test_version_2_mounted_with_local_events_counts_in_the_session_whatever_the_limit(groups: Groups) -> None:
    for file in ("pids.events", "pids.events.local"):
        groups.write(file, 1, 0, 0, key="max")
    groups.write("pids.peak", 20, LIMITS[1], 150)
    assert groups.processes() == "user"


@pytest.mark.parametrize(
    ("now", "named"), [((40, 60, 80), "session"), ((20, 99, 110), "user"), ((20, 60, 224), "all sessions")]
)
def test_before_linux_6_11_the_fullest_group_is_named(groups: Groups, now: tuple[int, int, int], named: str) -> None:
    """There is no `pids.peak`, and the session's own counter counts whatever the limit was."""
    groups.write("pids.current", *now)
    groups.write("pids.events", 0, 0, 0, key="max")
    assert groups.processes() is None
    groups.write("pids.events", 3, 0, 0, key="max")
    assert groups.processes() == named
    assert groups.processes() is None


@pytest.mark.parametrize(("peaks", "named"), [((40, 60, 80), "session"), ((20, 100, 110), "user")])
def test_version_1_goes_by_the_peaks(groups: Groups, peaks: tuple[int, int, int], named: str) -> None:
    groups.write("pids.peak", *peaks)
    groups.write("pids.events", 1, 0, 0, key="max")
    assert groups.processes() == named
