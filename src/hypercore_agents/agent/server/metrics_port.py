"""`METRICS_PORT`: the metrics on a separate port, for a Prometheus server that does not scrape through the manager.

Off by default. No bearer is needed: no series contains a user or session id.
"""

import contextlib
from collections.abc import AsyncIterator, Callable

from aiohttp import web

from hypercore_agents.http.serve import bind
from hypercore_agents.observability.metrics import CONTENT_TYPE


@contextlib.asynccontextmanager
async def serve_metrics(render: Callable[[], bytes], host: str, port: int | None) -> AsyncIterator[None]:
    """Serve `GET /metrics` while the context is open; do nothing without a port. Raises AddressError."""
    if port is None:
        yield
        return

    async def page(_: web.Request) -> web.Response:
        return web.Response(body=render(), headers={"content-type": CONTENT_TYPE})

    app = web.Application()
    app.router.add_get("/metrics", page)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.SockSite(runner, bind(host, port, "AGENT_HOST and METRICS_PORT")).start()
        yield
    finally:
        await runner.cleanup()
