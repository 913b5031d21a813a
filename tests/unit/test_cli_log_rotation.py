"""`up.log` is rotated while processes have it open."""

import os
from pathlib import Path

import pytest

from hypercore_agents.cli import log_rotation
from hypercore_agents.cli.log_rotation import keep_rotating, rotate


def appending(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def test_rotation_keeps_old_lines_and_the_log_accepts_new_ones(tmp_path: Path) -> None:
    log = tmp_path / "up.log"
    writer = appending(log)
    try:
        for round_ in range(4):
            os.write(writer, b"line %d\n" % round_)
            rotate(log)
            assert log.read_bytes() == b""
        os.write(writer, b"the newest\n")
    finally:
        os.close(writer)
    assert log.read_bytes() == b"the newest\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["up.log", "up.log.1", "up.log.2"]
    assert (tmp_path / "up.log.1").read_bytes() == b"line 3\n"
    assert (tmp_path / "up.log.2").read_bytes() == b"line 2\n"
    assert (tmp_path / "up.log.1").stat().st_mode & 0o777 == 0o600


async def test_only_the_open_log_is_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setattr(log_rotation, "LIMIT", 10)
    log, other = tmp_path / "up.log", tmp_path / "other.log"
    log.write_bytes(b"x" * 100)
    writer = appending(other)
    try:
        await asyncio.wait_for(keep_rotating(log, descriptor=writer), 10)  # in the foreground: returns at once
    finally:
        os.close(writer)
    assert log.stat().st_size == 100
    writer = appending(log)
    rotating = asyncio.create_task(keep_rotating(log, descriptor=writer))
    try:
        async with asyncio.timeout(20):
            while log.stat().st_size:
                await asyncio.sleep(0.01)
    finally:
        rotating.cancel()
        os.close(writer)
