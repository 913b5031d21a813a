"""A full disk under the database: a clear error, no loss, and recovery once there is space."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hypercore_agents.store.database import sqlite_url
from support.gateway_server import MODEL, gateway_site
from support.manager_server import Deployment, deployed
from support.simulator_fixtures import RunningSimulator
from support.store_fixtures import postgres_database, postgres_server
from support.waiting import until

SIZE_MB = 8
POSTGRESQL_MB = 80
"""About twice the size of a new server's tables."""


@pytest.fixture(params=[SIZE_MB])
def small_disk(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A separate file system of a few megabytes."""
    place = Path(tempfile.mkdtemp(prefix="hypercore-disk-", dir="/tmp"))  # pytest's folders are closed to other users
    place.chmod(0o711)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}m", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        place.rmdir()
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
        place.rmdir()


def fill(place: Path) -> Path:
    """Fill the disk completely."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    return filler


async def test_a_full_disk_is_a_clear_error_without_loss(small_disk: Path) -> None:
    async with deployed(small_disk / "state", min_agents=1, rate_limit_per_minute=0) as deployment:
        await filled_and_freed(deployment, small_disk)


@pytest.mark.parametrize("small_disk", [POSTGRESQL_MB], indirect=True)
@pytest.mark.postgres
async def test_a_full_disk_under_postgresql_behaves_the_same(small_disk: Path, tmp_path: Path) -> None:
    tables = small_disk / "tables"
    tables.mkdir()
    if os.geteuid() == 0:
        shutil.chown(tables, "postgres")
    with postgres_server(tables) as server, postgres_database(server) as url:
        async with deployed(tmp_path, database_url=url, min_agents=1, rate_limit_per_minute=0) as deployment:
            await filled_and_freed(deployment, small_disk)


async def filled_and_freed(deployment: Deployment, small_disk: Path) -> None:
    """Chat and spawn before, while and after the disk is full."""
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
    if deployment.database.is_sqlite:  # PostgreSQL may have room left in the page of the agents
        assert (status, answer["error"]["type"]) == (503, "unavailable"), answer
    spawned_meanwhile = status == 200

    async def store_is(expected: str) -> bool:
        _, health = await deployment.call("GET", "/health")
        return bool(health["dependencies"]["store"]["status"] == expected)

    await until(lambda: store_is("failing"))
    filler.unlink()

    async def goes_on() -> bool:
        status, answer = await deployment.chat("after", session_id=first["session_id"])
        assert status in (200, 409, 503), answer
        return status == 200

    await until(goes_on, seconds=60)
    await until(lambda: store_is("ok"))
    await deployment.warm(1)
    status, spawned = await deployment.call("POST", "/v1/agents/spawn", {"user_id": "ada"})
    assert status == 200, spawned
    assert set(deployment.host.sandboxes) == set(deployment.agents.running)
    assert len(deployment.host.sandboxes) == 2 + spawned_meanwhile


async def test_a_full_disk_loses_no_charge(small_disk: Path, tmp_path: Path, simulator: RunningSimulator) -> None:
    url = sqlite_url(small_disk / "store.db")
    async with gateway_site(tmp_path, url, simulator.url) as site:
        session_id = await site.session(model=MODEL, max_budget_usd=0.05)
        await site.turn(session_id)
        token, paid = site.token(session_id), 0
        prompt = [{"role": "user", "content": "[[tokens 100]]"}]
        filler = fill(small_disk)
        async with asyncio.timeout(60):
            while True:
                status, answer, headers = await asking(site.ask(token=token, messages=prompt))
                paid += 1
                if status != 200:
                    break
        refusal = (status, answer["error"]["type"], headers["x-should-retry"]) if status else None
        assert refusal in (None, (503, "unavailable", "true")), "an error of the platform, or an answer without its end"
        sent = len(simulator.requests())
        assert sent == paid, "the last request is charged too"
        status, answer, _ = await asking(site.ask(token=token, messages=prompt))
        assert (status, answer["error"]["type"]) == (503, "unavailable"), answer
        assert answer["error"]["request_id"]
        assert not {"Traceback", "store.db", "disk"} & set(str(answer).split())
        assert len(simulator.requests()) == sent, "no request is sent whose cost cannot be written"
        filler.unlink()

        async def written() -> bool:
            return len(await site.entries()) == paid

        await until(written, seconds=30)
        assert all(entry.output_tokens == 100 for entry in await site.entries())
        assert (await site.ask(token=token, messages=prompt))[0] == 200
        budgets = site.app._model._app._budgets  # type: ignore[attr-defined]
        assert budgets._accounts == {}, "waiting entries are written to the ledger once"


async def asking(answering: Any) -> tuple[int, Any, Any]:
    """Return status, body and headers of an answer; 0 of one that was cut."""
    try:
        found: tuple[int, Any, Any] = await answering
    except aiohttp.ClientError:
        return 0, None, None
    return found
