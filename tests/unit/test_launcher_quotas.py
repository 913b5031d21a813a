"""Quotas of sessions that share one disk: the limit of each, and that all limits together fit the disk."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from hypercore_agents.agent.isolation.disk_space import describe
from hypercore_agents.agent.launcher.quotas import QuotaStorage, UserQuotas, equal_share
from hypercore_agents.agent.launcher.storage import InsufficientDisk

_MB = 1 << 20
DISK_MB, INODES = 4096, 100_000


@pytest.mark.parametrize(
    ("capacity", "used", "share"),
    [
        (100, [], 0),
        (100, [0], 100),
        (100, [0, 0, 0, 0], 25),
        (100, [70, 0, 0], 15),  # a user above the share keeps its files; the others share the rest
        (100, [70, 20, 0], 10),
        (100, [99, 1, 1], 0),
        (100, [120, 0], 0),
    ],
)
def test_an_equal_share_excludes_what_larger_users_hold(capacity: int, used: list[int], share: int) -> None:
    assert equal_share(capacity, used) == share
    assert sum(max(share, size) for size in used) <= max(capacity, sum(used))


class StandInQuotas(UserQuotas):
    """A disk with quotas: a write takes as much as limit and disk allow."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.limits: dict[int, int] = {}

    def used(self, uid: int) -> tuple[int, int]:
        return self.held.get(uid, 0), 5

    def limit(self, uid: int, size: int, files: int) -> None:
        self.limits[uid] = size

    def write(self, uid: int) -> int:
        """Write until the quota or the disk is full; return the user's usage in MB."""
        others = sum(self.held.values()) - self.held.get(uid, 0)
        self.held[uid] = max(self.held.get(uid, 0), min(self.limits[uid], DISK_MB * _MB - others))
        return self.held[uid] // _MB


@pytest.fixture
def quotas(monkeypatch: pytest.MonkeyPatch) -> StandInQuotas:
    quotas = StandInQuotas()

    def statvfs(_: object) -> SimpleNamespace:
        free = DISK_MB * _MB - sum(quotas.held.values())
        return SimpleNamespace(
            f_blocks=DISK_MB * 256, f_frsize=4096, f_bfree=free // 4096, f_files=INODES, f_ffree=INODES
        )

    monkeypatch.setattr(os, "statvfs", statvfs)
    return quotas


def test_the_first_session_leaves_other_sessions_their_share(quotas: StandInQuotas, tmp_path: Path) -> None:
    storage = QuotaStorage(str(tmp_path), 1024, 10_000, quotas)
    storage.create("greedy", str(tmp_path / "greedy"), 1)
    assert quotas.write(1) == 1024
    for uid in range(2, 30):
        storage.create(str(uid), str(tmp_path / str(uid)), uid)
    assert quotas.write(1) == 1024, "it gets no more space"
    shares = {quotas.write(uid) for uid in range(2, 30)}
    assert min(shares) == max(shares) == int((DISK_MB * 0.95 - 1024) / 28)


def test_a_session_with_too_small_a_share_is_refused(quotas: StandInQuotas, tmp_path: Path) -> None:
    storage = QuotaStorage(str(tmp_path), 1024, 10_000, quotas)
    for uid in range(1, 4):
        storage.create(str(uid), str(tmp_path / str(uid)), uid)
        quotas.write(uid)
    for uid in range(4, 55):
        storage.create(str(uid), str(tmp_path / str(uid)), uid)
    before = dict(quotas.limits)
    with pytest.raises(InsufficientDisk, match=r"54 active sessions.*15 MB.*at least 16 MB.*SCRATCH_MB"):
        storage.create("55", str(tmp_path / "55"), 55)
    assert quotas.limits == before | {55: 0}
    storage.forget("1")
    quotas.held.pop(1)
    storage.create("59", str(tmp_path / "59"), 59)


def test_an_inactive_session_leaves_its_share_to_others(quotas: StandInQuotas, tmp_path: Path) -> None:
    storage = QuotaStorage(str(tmp_path), 4096, 10_000, quotas)
    for uid in (1, 2):
        storage.create(str(uid), str(tmp_path / str(uid)), uid)
    alone = int(DISK_MB * 0.95)
    assert quotas.limits[1] // _MB == alone // 2
    storage.deactivate("2")
    assert quotas.limits[1] // _MB == alone
    storage.activate("2")
    assert quotas.limits[1] == quotas.limits[2] == quotas.limits[1]
    storage.forget("2")
    assert quotas.limits[2] == 0, "another session may get the same uid"


def test_the_message_of_a_full_shared_disk_says_that_it_is_shared(quotas: StandInQuotas, tmp_path: Path) -> None:
    storage = QuotaStorage(str(tmp_path), 1024, 10_000, quotas)
    storage.create("alone", str(tmp_path / "alone"), 1)
    quotas.write(1)
    usage = storage.usage("alone")
    assert usage is not None
    assert describe(usage) is not None
    assert "the session's disk is full: 1024 of 1024 MB" in str(describe(usage)), "its own limit"
    for uid in range(2, 12):
        storage.create(str(uid), str(tmp_path / str(uid)), uid)
    quotas.write(11)
    usage = storage.usage("11")
    assert usage is not None
    assert "share of the agent's disk is full" in str(describe(usage))
    assert "since 11 active sessions share the disk (SCRATCH_MB)" in str(describe(usage))
