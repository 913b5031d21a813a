"""ImageStorage: spares one at a time, since there is one place for them; what all of them take of the disk."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypercore_agents.agent.launcher import kernel
from hypercore_agents.agent.launcher.disk_images import ImageStorage
from hypercore_agents.kit.linux.disk_reservations import on_disk


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageStorage:
    """ImageStorage without loop devices: the folder stands for the mount."""
    monkeypatch.setattr(kernel, "mount", lambda source, target, *_, **__: None)
    monkeypatch.setattr(ImageStorage, "_mount", lambda self, session, path: Path(path).mkdir())
    return ImageStorage(str(tmp_path), 64, 1000, None)


def test_no_spare_is_made_over_one_that_waits_or_is_being_made(made: ImageStorage, tmp_path: Path) -> None:
    first = made.next_spare()
    assert first is not None
    made.create("session-1", str(tmp_path / "1"), 1)  # while the spare is being made
    assert made.next_spare() is None
    made.spare_prepared(first, usable=True)
    assert made.next_spare() is None
    (tmp_path / "images" / f"{first}.ext4").touch()
    made.create("session-2", str(tmp_path / "2"), 2)
    assert (tmp_path / "images" / "session-2.ext4").exists(), "the spare's file goes with its mount"
    assert made.next_spare() not in (None, first)


def test_a_spare_that_failed_is_not_tried_again_before_a_session_comes(made: ImageStorage, tmp_path: Path) -> None:
    spare = made.next_spare()
    assert spare is not None
    made.spare_prepared(spare, usable=False)
    assert made.next_spare() is None
    made.create("session-1", str(tmp_path / "1"), 1)
    assert made.next_spare() is not None


def test_an_image_that_is_removed_while_they_are_added_up_hides_none_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.ext4").write_bytes(b"x" * 8192)
    scan = os.scandir

    @contextlib.contextmanager
    def scan_late(folder: str) -> Iterator[list[os.DirEntry[str]]]:
        with scan(folder) as entries:
            found = [*entries]
        (tmp_path / "a.ext4").unlink()
        yield found

    monkeypatch.setattr(os, "scandir", scan_late)
    assert on_disk(str(tmp_path)) >= 8192
