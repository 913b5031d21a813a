"""A minimal server of Claude agents: one process with one permanent `ClaudeSDKClient` per session.

`benchmarks/overload.py` compares the platform with it. It has no queue, no start limit and no parking. It only rejects
new sessions (503) if its Claude CLIs would fill a third of the machine's memory, so that the machine stays usable.
"""

import asyncio
import contextlib
import os
import signal
import uuid
from pathlib import Path

from aiohttp import web
from claude_agent_sdk import ClaudeSDKClient, ResultMessage
from session_density import plain_options

BARE_ADDRESS_VARIABLE = "BARE_PORT"
_MB_PER_CLI = 200


class Server:
    """Sessions by id, with the client of each."""

    def __init__(self, simulator: str, folder: Path) -> None:
        self._simulator = simulator
        self._folder = folder
        self._clients: dict[str, ClaudeSDKClient] = {}
        self._running = 0
        memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        self._most = max(8, memory_mb // 3 // _MB_PER_CLI)

    async def chat(self, request: web.Request) -> web.Response:
        """Run a turn in a new or an existing session."""
        body = await request.json()
        session_id = body.get("session_id") or str(uuid.uuid4())
        client = self._clients.get(session_id)
        if client is None:
            if self._running >= self._most:
                return web.json_response({"error": {"type": "out_of_memory"}}, status=503)
            self._running += 1
            folder = self._folder / session_id
            folder.mkdir()
            client = ClaudeSDKClient(plain_options(self._simulator, folder))
            try:
                await client.connect()
            except BaseException:
                self._running -= 1
                raise
            self._clients[session_id] = client
        await client.query(body["prompt"])
        failed = False
        async for message in client.receive_response():
            failed |= isinstance(message, ResultMessage) and message.is_error
        if failed:
            return web.json_response({"error": {"type": "model_error"}}, status=502)
        return web.json_response({"session_id": session_id})

    async def delete(self, request: web.Request) -> web.Response:
        """End a session."""
        client = self._clients.pop(request.match_info["session"], None)
        if client is not None:
            self._running -= 1
            with contextlib.suppress(Exception):
                await client.disconnect()
        return web.json_response({})

    async def close(self) -> None:
        """End all sessions."""
        await asyncio.gather(*(client.disconnect() for client in self._clients.values()), return_exceptions=True)


async def health(_: web.Request) -> web.Response:
    """Report that the server runs."""
    return web.json_response({"status": "ok"})


async def main() -> None:
    """Serve until SIGTERM."""
    server = Server(os.environ["SIMULATOR"], Path(os.environ["FOLDER"]))
    app = web.Application()
    app.router.add_post("/v1/agent/chat", server.chat)
    app.router.add_delete("/v1/agent/session/{session}", server.delete)
    app.router.add_get("/health", health)
    runner = web.AppRunner(app, handler_cancellation=False, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(os.environ[BARE_ADDRESS_VARIABLE])).start()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await server.close()
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
