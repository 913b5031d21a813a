"""A killed image build leaves no partial image, no process and no mount; pruning removes its folder."""

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


@pytest.mark.root
@pytest.mark.qemu
@pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="needs mmdebstrap")
def test_build_killed_early_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"
    _kill_a_build(folder, monkeypatch, "installing Debian", "base/root/*")
    assert prune(folder)[0].startswith(".building-")
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_build_killed_at_packing(guest_image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    # The layers of the shared folder are reused; hard links to them need the same file system.
    shared = guest_image.folder.parents[1]
    folder = Path(tempfile.mkdtemp(prefix="test-", dir=shared))
    (folder / "layers").symlink_to(shared / "layers")
    try:
        _kill_a_build(folder, monkeypatch, "packing the root", "image/root.squashfs")
    finally:
        shutil.rmtree(folder)
    assert verify(guest_image) == []


def _kill_a_build(folder: Path, monkeypatch: pytest.MonkeyPatch, step: str, made: str) -> None:
    """Kill a build in a step, once the step has made a file, and check what is left."""
    monkeypatch.setenv("HYPERCORE_IMAGE_DIR", str(folder))
    state = folder / "state"
    command = [sys.executable, "-m", "hypercore_agents", "image", "build"]
    environment = {**os.environ, "STATE_DIR": str(state)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        assert any(step in line for line in process.stderr)
        _wait_until(lambda: any(folder.glob(f".building-*/{made}")) and bool(_processes_in(folder)))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    _wait_until(lambda: not _processes_in(folder))
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()
    assert find(state) is None
    assert images.listing(state) == []
    assert not list(folder.glob("images/*"))
    assert len(list(folder.glob(".building-*"))) == 1


def _processes_in(folder: Path) -> list[int]:
    """Return the processes, except this one, whose command line contains the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if str(folder).encode() in line and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def _wait_until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
