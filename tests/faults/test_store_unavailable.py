"""PostgreSQL stops under a manager and returns: metrics still work and report it, without a restart."""

from pathlib import Path

import aiohttp
import pytest

from hypercore_agents.security.bearers import digest, new_bearer
from hypercore_agents.store.bearers import BearerRow, add_bearer, delete_bearer
from support.manager_server import Deployment, deployed
from support.store_fixtures import postgres_server, stopped
from support.waiting import until

SECRET = "a-secret-of-32-bytes-for-tests-0123"
STORE_UP = 'hypercore_manager_dependency_up{dependency="store"}'


async def scrape(site: Deployment, bearer: str) -> tuple[int, dict[str, float]]:
    """Return the status and the samples of `/metrics` for this bearer."""
    headers = {"authorization": f"Bearer {bearer}"}
    async with aiohttp.ClientSession() as http, http.get(f"{site.url}/metrics", headers=headers) as answer:
        page = await answer.text()
    lines = (line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("hypercore_"))
    return answer.status, {name: float(value) for name, value in lines}


@pytest.mark.postgres
async def test_metrics_work_and_report_an_unavailable_store(tmp_path: Path) -> None:
    known, unused, revoked = new_bearer(), new_bearer(), new_bearer()
    with postgres_server() as folder:
        url = f"postgresql+psycopg://test@/postgres?host={folder}"
        async with deployed(tmp_path, database_url=url, enable_auth=True, jwt_secret=SECRET) as site:
            async with site.database.write() as connection:
                for name, bearer in (("known", known), ("unused", unused), ("revoked", revoked)):
                    await add_bearer(connection, BearerRow(digest(bearer), name, "metrics", None, 1.0, None))
            for bearer in (known, revoked):
                assert (await scrape(site, bearer))[0] == 200
            async with site.database.write() as connection:
                assert await delete_bearer(connection, "revoked")
            assert (await scrape(site, revoked))[0] == 401

            async def shows(up: float) -> bool:
                async with site.http.get(f"{site.url}/health") as answer:
                    assert answer.status == 503
                status, samples = await scrape(site, known)
                assert status == 200
                return samples[STORE_UP] == up

            await until(lambda: shows(1.0), seconds=20)
            with stopped(folder):
                await until(lambda: shows(0.0), seconds=20)
                assert (await scrape(site, unused))[0] == 503, "only the store has this bearer"
                assert (await scrape(site, revoked))[0] == 503
            await until(lambda: shows(1.0), seconds=20)
            assert (await scrape(site, unused))[0] == 200
