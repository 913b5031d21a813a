"""The cost of a session's own file system, compared with a plain folder whose size is only scanned.

It measures only the launcher's part of a new session, without CLIs: the rest is the same. Per session in milliseconds:
`made` (image, loop device, mount and folders, or folders alone; for `spare`, with an image mounted in advance),
`written` (256 small files and 16 MB, synchronised) and `removed`; per session in KB: disk and memory of the host for an
empty session. Requires root.
"""

import os
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from measuring import arguments, percentile, table, write_json

from hypercore_agents.agent.launcher import kernel
from hypercore_agents.agent.launcher.disk_images import ImageStorage
from hypercore_agents.agent.launcher.folders import Folders
from hypercore_agents.agent.launcher.storage import Storage

LIMIT_MB, FILES = 256, 100_000
_FIRST_USER = 2_109_000_000


def measure(storage: Storage, state: Path, sessions: int, *, spares: bool) -> dict[str, float]:
    """Return the medians of one kind of storage."""
    folders = Folders(str(state), range(_FIRST_USER, _FIRST_USER + sessions + 1), storage)
    names = [f"{number:08x}" for number in range(sessions + 1)]
    folders.open(names[0])  # creates the parts shared by all sessions
    before = _free_kb(), _disk_kb(state)
    made, written, removed = [], [], []
    for name in names[1:]:
        if spares and (spare := storage.next_spare()) is not None:
            storage.prepare_spare(spare)
            storage.spare_prepared(spare, usable=True)
        began = time.perf_counter()
        folders.open(name)
        made.append(time.perf_counter() - began)
    empty = (before[0] - _free_kb()) / sessions, (_disk_kb(state) - before[1]) / sessions
    for name in names[1:]:
        workspace = Path(folders.root, name, "workspace")
        began = time.perf_counter()
        for number in range(256):
            (workspace / str(number)).write_bytes(b"x" * 512)
        with (workspace / "large").open("wb") as file:
            file.write(bytes(16 << 20))
            file.flush()
            os.fsync(file.fileno())
        written.append(time.perf_counter() - began)
    for name in names:
        began = time.perf_counter()
        folders.remove(name)
        folders.forget(name)
        removed.append(time.perf_counter() - began)
    figures = {"made": made, "written": written, "removed": removed[1:]}
    medians = {f"{what}_p50_ms": round(1000 * percentile(values, 0.5), 2) for what, values in figures.items()}
    return medians | {
        "made_p95_ms": round(1000 * percentile(made, 0.95), 2),
        "memory_kb": round(max(0.0, empty[0])),
        "disk_kb": round(empty[1]),
    }


def _free_kb() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/meminfo").open() if line.startswith("MemFree:"))


def _disk_kb(state: Path) -> int:
    """Return the folder's usage of the host's disk; it contains the images and does not follow their mounts."""
    return int(subprocess.run(["du", "-xsk", state], capture_output=True, check=True).stdout.split()[0])


def run(quick: bool) -> dict[str, Any]:
    """Measure each kind of storage, one after another."""
    if os.geteuid() != 0:
        raise SystemExit("session_disk requires root")
    sessions = 10 if quick else 100
    found: dict[str, Any] = {}
    kernel.enter_mount_namespace()
    with tempfile.TemporaryDirectory() as root:
        state = Path(root)
        for kind in ("folder", "image", "spare"):
            (state / kind).mkdir()
            began = time.perf_counter()
            storage = Storage("") if kind == "folder" else ImageStorage(str(state / kind), LIMIT_MB, FILES, None)
            if isinstance(storage, ImageStorage):
                storage.probe()
            once = time.perf_counter() - began
            found[kind] = measure(storage, state / kind, sessions, spares=kind == "spare") | {
                "once_ms": round(1000 * once, 1)
            }
            with suppress(OSError):
                shutil.rmtree(state / kind)
    return found | {"sessions": sessions}


def main() -> None:
    """Run from the command line."""
    options = arguments(__doc__ or "").parse_args()
    found = run(options.quick)
    columns = ("made_p50_ms", "made_p95_ms", "written_p50_ms", "removed_p50_ms", "memory_kb", "disk_kb", "once_ms")
    rows = [[kind, *(f"{found[kind][column]:g}" for column in columns)] for kind in ("folder", "image", "spare")]
    ratios = [found["spare"][column] / (found["folder"][column] or 1) for column in columns]
    rows.append(["spare/folder", *(f"{ratio:.2f}" for ratio in ratios)])
    table(f"A session's own file system, {found['sessions']} sessions", ["", *columns], rows)
    write_json(options.json, {"benchmark": "session_disk", **found})


if __name__ == "__main__":
    main()
