"""HEAD probes of load balancers get the status of GET without a body, and the connection stays usable."""

import asyncio
from pathlib import Path
from typing import Any
from unittest import mock

from fastapi.routing import APIRoute

from hypercore_agents.agent.server.routes import build_router
from hypercore_agents.autoscaler.app import create_app as autoscaler_app
from hypercore_agents.autoscaler.settings import AutoscalerSettings
from hypercore_agents.gateway.app import create_app as gateway_app
from hypercore_agents.gateway.settings import GatewaySettings
from support.manager_server import deployed

PROBED = {"/health", "/ready", "/metrics"}


async def test_head_returns_the_status_of_get_without_a_body(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state") as site:
        host, _, port = site.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))

        async def ask(method: str, path: str) -> tuple[bytes, bytes]:
            writer.write(f"{method} {path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
            body = b"" if method == "HEAD" else await reader.readexactly(int(length.split(b":")[1]))
            return head.split(b"\r\n")[0], body

        for path in sorted(PROBED):
            status, _ = await ask("HEAD", path)
            assert b" 405 " not in status
            assert status == (await ask("GET", path))[0], path
        status, _ = await ask("HEAD", "/v1/agents/stats")
        assert status == b"HTTP/1.1 405 Method Not Allowed"
        writer.close()


def test_every_server_supports_head_on_probed_routes(tmp_path: Path) -> None:
    gateway = gateway_app(GatewaySettings(state_dir=tmp_path))
    autoscaler: Any = autoscaler_app(AutoscalerSettings())
    apps: list[Any] = [gateway.operator, gateway._lifespan, autoscaler, build_router(mock.Mock())]
    for outermost in apps:
        app = outermost
        while not hasattr(app, "routes"):
            app = app._app
        routes = [route for route in app.routes if isinstance(route, APIRoute)]
        probed = {route.path for route in routes} & PROBED
        assert probed
        for path in probed:
            methods = {method for route in routes if route.path == path for method in route.methods or ()}
            assert {"GET", "HEAD"} <= methods, path
