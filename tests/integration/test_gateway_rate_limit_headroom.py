"""Rate limit headroom: from headers of the Claude API to the gauge, the store and the manager's statistics."""

import math
from pathlib import Path

from aiohttp import web
from prometheus_client import CollectorRegistry

from hypercore_agents.gateway.rate_limit_headroom import RateLimitHeadroom
from hypercore_agents.observability.metrics import GatewayMetrics
from hypercore_agents.store.database import Database, sqlite_url
from hypercore_agents.store.keys import put_key
from hypercore_agents.store.schema import migrate
from hypercore_agents.store.signals import API_HEADROOM, get_signal
from support.gateway_server import DEDICATED, MODEL, gateway_site
from support.manager_server import aiohttp_served

MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": MODEL,
    "content": [{"type": "text", "text": "hi"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 1},
}


def headers(left: int, most: int, limit: str = "tokens", reset: str = "2100-01-01T00:00:00Z") -> dict[str, str]:
    prefix = f"anthropic-ratelimit-{limit}"
    return {f"{prefix}-limit": str(most), f"{prefix}-remaining": str(left), f"{prefix}-reset": reset}


async def test_the_lowest_share_counts_until_its_reset(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path / "store.db"))
    await migrate(database)
    now = [1_000_000.0]
    metrics = GatewayMetrics(CollectorRegistry())
    headroom = RateLimitHeadroom(metrics, database, lambda: now[0])
    assert math.isnan(headroom.update_gauges())
    await headroom.publish()

    async def stored() -> float | None:
        async with database.read() as connection:
            return await get_signal(connection, API_HEADROOM, since=now[0] - 30)

    assert await stored() is None
    headroom.observe(200, {**headers(900, 1000, "requests"), **headers(20, 1000, "input-tokens")})
    assert headroom.update_gauges() == 0.02
    assert metrics.headroom.labels("requests")._value.get() == 0.9
    await headroom.publish()
    assert await stored() == 0.02

    headroom.observe(429, {"retry-after": "20"})
    assert headroom.update_gauges() == 0.0
    now[0] += 21
    assert headroom.update_gauges() == 0.02, "the exceeded limit has reset, the other has not"
    now[0] += 86_401
    assert headroom.update_gauges() == 1.0, "a reset is at most a day away"
    await headroom.publish()
    assert await stored() == 1.0

    for garbled in ({**headers(5, 0)}, {"anthropic-ratelimit-tokens-limit": "many"}, headers(2, 10, reset="soon")):
        headroom.observe(200, garbled)
    assert headroom.update_gauges() == 0.2
    now[0] += 61
    assert headroom.update_gauges() == 1.0
    await database.close()


async def test_only_answers_to_the_platform_key_count(tmp_path: Path) -> None:
    left = 250

    async def messages(_: web.Request) -> web.Response:
        return web.json_response(MESSAGE, headers=headers(left, 1000))

    api = web.Application()
    api.router.add_post("/v1/messages", messages)
    async with (
        aiohttp_served(api) as url,
        gateway_site(tmp_path, sqlite_url(tmp_path / "store.db"), url) as site,
    ):
        line = 'hypercore_gateway_rate_limit_headroom{kind="tokens"}'
        assert f"{line} 1.0" in await site.metrics()
        assert (await site.ask(token=site.token(await site.session())))[0] == 200
        assert f"{line} 0.25" in await site.metrics()
        left = 0
        async with site.database.write() as connection:
            sealed = site.sealer.seal("sk-ant-of-an-agent", f"agent:{DEDICATED}")
            await put_key(connection, f"agent:{DEDICATED}", sealed, now=0.0)
        assert (await site.ask(token=site.token(await site.session(agent_id=DEDICATED))))[0] == 200
        assert f"{line} 0.25" in await site.metrics()
