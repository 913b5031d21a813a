"""Serving an ASGI app on an ephemeral loopback port for the length of a test."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import uvicorn

from hypercore_agents.http.corking import CorkingProtocol
from hypercore_agents.http.serve import bind


@contextlib.asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """Serve the app in this event loop; gives its base URL."""
    listener = bind("127.0.0.1", 0, "PORT")
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=CorkingProtocol,
            log_config=None,
            access_log=False,
            lifespan="auto",
            ws="none",
            timeout_graceful_shutdown=2,
        )
    )
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
