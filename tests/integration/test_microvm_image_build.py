"""A build that is killed half-way: no half image, no process, no mount; the next look finds nothing and cleans up."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hypercore_agents.compute.microvm.image import find, images, prune


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mmdebstrap") is None, reason="needs root and mmdebstrap")
def test_a_build_killed_half_way_leaves_no_half_image_and_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPERCORE_IMAGE_DIR", str(tmp_path / "images"))
    command = [sys.executable, "-m", "hypercore_agents", "image", "build"]
    environment = {**os.environ, "STATE_DIR": str(tmp_path / "state")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        assert "installing Debian" in process.stderr.readline()
        _until(lambda: any((tmp_path / "images").glob(".building-*/base/root/*")) and bool(_working_in(tmp_path)))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    _until(lambda: not _working_in(tmp_path))
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert find(tmp_path / "state") is None
    assert images.listing(tmp_path / "state") == []
    assert len(list((tmp_path / "images").glob(".building-*"))) == 1
    assert prune(tmp_path / "state")[0].startswith(".building-")
    assert [path.name for path in (tmp_path / "images").iterdir()] == [".lock"]


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
