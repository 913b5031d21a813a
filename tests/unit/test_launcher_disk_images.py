"""Images of sessions: one spare at a time, and the disk space that all images take."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypercore_agents.agent.launcher import kernel
from hypercore_agents.agent.launcher.disk_images import ImageStorage
from hypercore_agents.kit.linux.disk_reservations import on_disk


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageStorage:
    """Image storage with plain folders instead of mounts and loop devices."""
    monkeypatch.setattr(kernel, "mount", lambda source, target, *_, **__: None)
    monkeypatch.setattr(ImageStorage, "_mount", lambda self, session, path: Path(path).mkdir())
    return ImageStorage(str(tmp_path), 64, 1000, None)


def test_there_is_at_most_one_spare(images: ImageStorage, tmp_path: Path) -> None:
    first = images.next_spare()
    assert first is not None
    images.create("session-1", str(tmp_path / "1"), 1)  # while the spare is being prepared
    assert images.next_spare() is None
    images.spare_prepared(first, usable=True)
    assert images.next_spare() is None
    (tmp_path / "images" / f"{first}.ext4").touch()
    images.create("session-2", str(tmp_path / "2"), 2)
    assert (tmp_path / "images" / "session-2.ext4").exists(), "the spare's file is renamed along with its mount"
    assert images.next_spare() not in (None, first)


def test_a_failed_spare_is_retried_only_after_a_new_session(images: ImageStorage, tmp_path: Path) -> None:
    spare = images.next_spare()
    assert spare is not None
    images.spare_prepared(spare, usable=False)
    assert images.next_spare() is None
    images.create("session-1", str(tmp_path / "1"), 1)
    assert images.next_spare() is not None


def test_an_image_removed_during_a_count_does_not_hide_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
