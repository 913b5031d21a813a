"""Serves an ASGI app for a test: on a free loopback port, or to one client with access to its protocol."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import uvicorn

from hypercore_agents.http.receive_timeouts import ReceiveTimeouts, TimeoutProtocol
from hypercore_agents.http.serve import bind, configuration
from hypercore_agents.http.write_coalescing import CoalescingProtocol


@contextlib.asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """Serve the app in this event loop; yields its base URL."""
    listener = bind("127.0.0.1", 0, "PORT")
    server = uvicorn.Server(configuration(app, lifespan="auto", timeout_graceful_shutdown=2))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    with contextlib.closing(listener):
        task = asyncio.create_task(server.serve(sockets=[listener]))
        async with asyncio.timeout(20):
            while not server.started:
                if task.done():
                    await task
                    raise RuntimeError("the server ended before it started")
                await asyncio.sleep(0)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


@contextlib.asynccontextmanager
async def serve_one_client(
    app: Any, keep_alive: float, *, http: type[TimeoutProtocol] = CoalescingProtocol, receive_timeout: float = 3600
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, set[Any]]]:
    """Serve the app; yields one client's reader and writer, and the server's connections."""
    config = configuration(app, lifespan="off")
    config.http = http
    config.timeout_keep_alive = keep_alive  # type: ignore[assignment]  # fractions of a second work too
    vars(config)["receive_timeouts"] = ReceiveTimeouts(receive_timeout)
    config.load()
    state = uvicorn.server.ServerState()
    listener = bind("127.0.0.1", 0, "PORT")
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: http(config, state, {}), sock=listener)
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    try:
        yield reader, writer, state.connections
    finally:
        writer.close()
        server.close()
        async with asyncio.timeout(20):
            while state.connections:
                await asyncio.sleep(0.01)
