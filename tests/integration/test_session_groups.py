"""Control groups of sessions and users in the real kernel, and processes that fill them. Needs root.

Tests the launcher's groups without namespaces, CLI or server; the tests in `security/` cover those.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hypercore_agents.agent.launcher.group_setup import move_processes
from hypercore_agents.agent.launcher.groups import LEAST_SHARE_MB, LimitReached, SessionGroups
from hypercore_agents.kit.linux import cgroups

FOUND = cgroups.detect()
pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(60),
    pytest.mark.skipif(
        FOUND is None or not {"memory", "pids"} <= FOUND.enforced, reason="no control groups for memory and pids here"
    ),
]
UID = 2_147_000_000
_HOLDS = """
import sys
held = []
for line in sys.stdin:
    held.append(bytearray(int(line) << 20))
    print("holds", flush=True)
"""
Hold = Callable[[tuple[str, ...]], "Holder"]


class Holder:
    """A process in a session's groups that takes memory on request."""

    def __init__(self, groups: tuple[str, ...]) -> None:
        self.process = subprocess.Popen(
            ["/usr/bin/python3", "-I", "-S", "-c", _HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for group in groups:
            (Path(group) / "cgroup.procs").write_text(str(self.process.pid))

    def take(self, megabytes: int) -> bool:
        """Take memory; return False if the kernel killed the process instead."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(f"{megabytes}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        return self.process.stdout.readline() == "holds\n"

    def score(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/oom_score_adj").read_text())

    def group(self) -> str:
        """Return the group that limits its memory."""
        lines = Path(f"/proc/{self.process.pid}/cgroup").read_text().splitlines()
        fields = [line.split(":", 2) for line in lines]
        return next((path for _, name, path in fields if name == "memory"), fields[-1][2])

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def one_ended(*holders: Holder) -> bool:
    """Return whether one of the processes ends within some seconds; a killed process may take a moment to end."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if any(holder.process.poll() is not None for holder in holders):
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def hold() -> Iterator[Hold]:
    holders: list[Holder] = []

    def start(groups: tuple[str, ...]) -> Holder:
        holders.append(Holder(groups))
        return holders[-1]

    yield start
    for holder in holders:
        holder.end()


@pytest.fixture
def groups() -> Iterator[SessionGroups]:
    """Groups of an agent of 1,024 MB: 768 for all sessions, 460 for a user's share of 0.6. List it before `hold`."""
    groups = SessionGroups(cgroups.Limits(None, 300, 40), memory_mb=1024, processes=256)
    assert groups.enforced
    yield groups
    groups.close()


def test_a_prewarmed_process_counts_against_its_user(groups: SessionGroups, hold: Hold) -> None:
    prewarmed = hold(groups.ensure("s1", UID))
    assert prewarmed.take(150)
    assert "/unassigned/" in prewarmed.group()
    groups.assign("s1", UID, "ada", 0.6)
    assert "/user-" in prewarmed.group()
    # 150 MB stay charged where they were: its session has 150 left of 300, its user 310 of 460.
    other = hold(groups.ensure("s2", UID + 1, "ada", 0.6))
    assert other.take(250)
    assert prewarmed.take(40)
    assert groups.reached_limit("s1") is groups.reached_limit("s2") is None
    third = hold(groups.ensure("s3", UID + 2, "ada", 0.6))
    third.take(60)
    assert one_ended(prewarmed, other, third)
    reached = [reached for session in ("s1", "s2", "s3") if (reached := groups.reached_limit(session)) is not None]
    assert [(limit.kind, str(limit)) for limit in reached] == [
        ("memory", "this user's sessions used up their share of the agent's memory, 460 MB (USER_SHARE)")
    ]
    # A user whose share is used up does not get a prewarmed process, which stays unassigned.
    prewarmed = hold(groups.ensure("s4", UID + 3))
    assert prewarmed.take(250)
    with pytest.raises(LimitReached, match="share of the agent's memory"):
        groups.assign("s4", UID + 3, "ada", 0.6)
    assert "/unassigned/" in prewarmed.group()
    groups.assign("s4", UID + 3, "bob", 0.6)
    assert "/user-" in prewarmed.group()


def test_a_share_is_restored_when_a_prewarmed_process_ends(groups: SessionGroups, hold: Hold) -> None:
    prewarmed = hold(groups.ensure("s1", UID))
    assert prewarmed.take(200)
    groups.assign("s1", UID, "ada", 0.6)
    other = hold(groups.ensure("s2", UID + 1, "ada", 0.6))
    assert other.take(200)
    prewarmed.end()
    groups.release("s1")
    again = hold(groups.ensure("s1", UID, "ada", 0.6))
    assert again.take(220), "the session and its user have their whole limits"
    assert groups.reached_limit("s1") is None


def test_a_reached_session_limit_is_named(groups: SessionGroups, hold: Hold) -> None:
    hog = hold(groups.ensure("s1", UID, "ada", 1.0))
    assert not hog.take(320)
    reached = groups.reached_limit("s1")
    assert reached is not None
    named = "the session's memory limit of 300 MB was reached (--session-memory-mb of the agent's launcher)"
    assert (reached.kind, str(reached)) == ("memory", named)
    assert groups.reached_limit("s1") is None, "it is reported once"


_FORKS = """
import os, time
for _ in range(60):
    try:
        if os.fork() == 0:
            time.sleep(600)
    except BlockingIOError:
        break
"""


def test_a_reached_process_limit_is_reported_to_each_reader(groups: SessionGroups, hold: Hold) -> None:
    own = groups.ensure("s1", UID, "ada", 1.0)
    before = groups.counters("s1")
    holder = hold(own)
    assert groups.reached_limit("s1", before) is None
    bomb = subprocess.Popen(
        ["/bin/sh", "-c", 'read go; exec /usr/bin/python3 -c "$1"', "sh", _FORKS], stdin=subprocess.PIPE
    )
    for group in own:
        (Path(group) / "cgroup.procs").write_text(str(bomb.pid))
    bomb.communicate(b"go\n", timeout=30)
    named = "the session's limit of 40 processes and threads was reached (--session-processes of the agent's launcher)"
    try:
        for since in (before, None, before):
            reached = groups.reached_limit("s1", since)
            assert reached is not None, since
            assert (reached.kind, str(reached)) == ("processes", named)
        assert groups.reached_limit("s1") is None, "it is reported to the turn once"
        assert groups.reached_limit("s1", groups.counters("s1")) is None
    finally:
        for pid in cgroups.members(own):
            os.kill(pid, signal.SIGKILL)
        holder.end()


@pytest.mark.parametrize("fails", ["making", "moving"])
def test_a_failed_assignment_leaves_the_process_in_its_group(
    groups: SessionGroups, hold: Hold, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    prewarmed = hold(groups.ensure("s1", UID))
    before = prewarmed.group()
    groups.ensure("s2", UID + 1, "ada", 0.6)
    with monkeypatch.context() as patched:
        if fails == "making":
            patched.setattr(cgroups.Cgroups, "create", failing)
        else:
            moves = iter((True, False))

            def move_and_fail(old: tuple[str, ...], new: tuple[str, ...]) -> None:
                move_processes(old, new)
                if next(moves):
                    raise OSError("no more")

            patched.setattr("hypercore_agents.agent.launcher.groups.move_processes", move_and_fail)
        with pytest.raises(OSError, match="no more"):
            groups.assign("s1", UID, "ada", 0.6)
    assert prewarmed.group() == before
    assert len(groups._users["ada"].sessions) == 1
    groups.assign("s1", UID, "ada", 0.6)
    assert "/user-" in prewarmed.group()
    assert groups.ensure("s1", UID, "ada", 0.6)
    prewarmed.end()
    groups.release("s1")
    assert "s1" not in groups._sessions


def failing(*_: object) -> None:
    raise OSError("no more")


def test_the_largest_user_is_killed_at_the_limit_of_all_sessions(groups: SessionGroups, hold: Hold) -> None:
    """Three users within their shares, which together exceed the 768 MB of all sessions. An equal part is 256."""
    victim = hold(groups.ensure("victim", UID, "victim", 0.6))
    assert victim.take(180), "the largest process of all, but less than an equal part"
    attackers = []
    for number, user in enumerate(("mallory", "trudy")):
        holders = [hold(groups.ensure(f"{user}-{n}", UID + 10 * number + n + 1, user, 0.6)) for n in range(4)]
        attackers += holders
        assert all(holder.take(65) for holder in holders)
        groups.adjust_oom_scores()
    assert {holder.score() for holder in attackers} == {1000}
    assert victim.score() < 1000
    # The kernel kills one after the other until the memory suffices.
    for holder in attackers:
        holder.take(40)
    assert one_ended(*attackers)
    assert victim.take(20), "it is alive and can take memory"
    # The score returns to normal after the user has freed memory.
    for holder in attackers[:4]:
        holder.end()
    groups.adjust_oom_scores()
    assert victim.score() < 1000


def test_groups_of_a_killed_launcher_do_not_disable_limits(groups: SessionGroups) -> None:
    groups.ensure("s1", UID, "ada", 0.6)
    again = SessionGroups(cgroups.Limits(None, 300, 40), memory_mb=1024, processes=256)
    assert again._scope == groups._scope
    assert {"memory", "pids"} <= again.enforced
    assert again.ensure("s1", UID, "ada", 0.6)
    again.close()


def test_on_a_small_agent_a_users_share_fits_one_cli(hold: Hold) -> None:
    small = SessionGroups(cgroups.Limits(None, None, None), memory_mb=512, processes=128)
    try:
        holder = hold(small.ensure("s1", UID, "ada", 0.1))
        assert small._users["ada"].memory_mb == min(LEAST_SHARE_MB, 384)
        holder.end()
        small.release("s1")
    finally:
        small.close()
    assert not list(Path("/sys/fs/cgroup").glob(f"*/*{small._scope}*"))
