"""A full disk under the manager's database: a clear error, nothing lost, and work goes on once there is room."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manager_sides import deployed, until

SIZE_MB = 8


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> Path:
    """Leave no byte free."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    return filler


async def test_a_full_disk_is_a_clear_error_and_nothing_is_lost(small_disk: Path) -> None:
    async with deployed(small_disk / "state", min_agents=1, rate_limit_per_minute=0) as deployment:
        await deployment.warm(1)
        status, first = await deployment.chat("before")
        assert status == 200, first
        filler = fill(small_disk)
        refused: list[Any] = []

        async def is_refused() -> bool:
            status, answer = await deployment.chat("while it is full")
            if status != 200:
                refused.append((status, answer))
            return bool(refused)

        await until(is_refused, seconds=60)
        ((status, answer),) = refused
        assert (status, answer["error"]["type"]) == (503, "unavailable"), answer
        assert answer["error"]["retryable"]
        assert answer["error"]["request_id"]
        assert "Traceback" not in str(answer)
        assert "store.db" not in str(answer)
        status, answer = await deployment.call("POST", "/v1/agents/spawn", {"user_id": "ada"})
        assert (status, answer["error"]["type"]) == (503, "unavailable"), answer

        filler.unlink()

        async def goes_on() -> bool:
            status, answer = await deployment.chat("after", session_id=first["session_id"])
            assert status in (200, 409, 503), answer
            return status == 200

        await until(goes_on, seconds=60)
        await deployment.warm(1)
        status, spawned = await deployment.call("POST", "/v1/agents/spawn", {"user_id": "ada"})
        assert status == 200, spawned
        assert set(deployment.host.sandboxes) == set(deployment.agents.running)
        assert len(deployment.host.sandboxes) == 2
