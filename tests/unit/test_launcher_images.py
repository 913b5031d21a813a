"""Spares of images: one at a time, since there is one place for them."""

from pathlib import Path

import pytest

from hypercore_agents.agent.launcher import kernel
from hypercore_agents.agent.launcher.images import Images


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Images:
    """Images without loop devices: the folder stands for the mount."""
    monkeypatch.setattr(kernel, "mount", lambda source, target, *_, **__: None)
    monkeypatch.setattr(Images, "_mount", lambda self, session, path: Path(path).mkdir())
    return Images(str(tmp_path), 64, 1000, None)


def test_no_spare_is_made_over_one_that_waits_or_is_being_made(made: Images, tmp_path: Path) -> None:
    first = made.next_spare()
    assert first is not None
    made.make("session-1", str(tmp_path / "1"), 1)  # while the spare is being made
    assert made.next_spare() is None
    made.prepared(first, usable=True)
    assert made.next_spare() is None
    (tmp_path / "images" / f"{first}.ext4").touch()
    made.make("session-2", str(tmp_path / "2"), 2)
    assert (tmp_path / "images" / "session-2.ext4").exists(), "the spare's file goes with its mount"
    assert made.next_spare() not in (None, first)


def test_a_spare_that_failed_is_not_tried_again_before_a_session_comes(made: Images, tmp_path: Path) -> None:
    spare = made.next_spare()
    assert spare is not None
    made.prepared(spare, usable=False)
    assert made.next_spare() is None
    made.make("session-1", str(tmp_path / "1"), 1)
    assert made.next_spare() is not None
