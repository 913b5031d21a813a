"""A build that is killed half-way: no half image, no process, no mount; the next look finds nothing and cleans up."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hypercore_agents.compute.microvm.image import Image, find, images, prune, verify


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mmdebstrap") is None, reason="needs root and mmdebstrap")
def test_a_build_killed_half_way_leaves_no_half_image_and_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    _kill_a_build(folder, monkeypatch, "installing Debian", "base/root/*")
    assert prune(folder)[0].startswith(".building-")
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_build_killed_as_it_packs_leaves_no_half_image(guest_image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    # Layers are as good as new; hard links need their file system.
    shared = guest_image.folder.parents[1]
    folder = Path(tempfile.mkdtemp(prefix="of-test-", dir=shared))
    (folder / "layers").symlink_to(shared / "layers")
    try:
        _kill_a_build(folder, monkeypatch, "packing the root", "image/root.squashfs")
    finally:
        shutil.rmtree(folder)
    assert verify(guest_image) == []


def _kill_a_build(folder: Path, monkeypatch: pytest.MonkeyPatch, step: str, made: str) -> None:
    """Kill a build in that step, once that is there, and look at what is left."""
    monkeypatch.setenv("HYPERCORE_IMAGE_DIR", str(folder))
    state = folder / "state"
    command = [sys.executable, "-m", "hypercore_agents", "image", "build"]
    environment = {**os.environ, "STATE_DIR": str(state)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        assert any(step in line for line in process.stderr)
        _until(lambda: any(folder.glob(f".building-*/{made}")) and bool(_working_in(folder)))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    _until(lambda: not _working_in(folder))
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()
    assert find(state) is None
    assert images.listing(state) == []
    assert not list(folder.glob("images/*"))
    assert len(list(folder.glob(".building-*"))) == 1


def _working_in(folder: Path) -> list[int]:
    """Return processes that name the folder in their command line (but not this one)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if str(folder).encode() in line and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def _until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)
