"""The response that sends one workspace file, on bare ASGI: as many bytes as announced, or the connection is cut.

A client that reads nothing for `SLOW_SECONDS` is disconnected, so that it occupies neither a process of the session
nor a connection.
"""

import asyncio

import structlog

from hypercore_agents.agent.isolation.files import SLOW_SECONDS, WHOLE_SECONDS, OpenFile, WorkspaceFiles
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.http.context import Receive, Scope, Send
from hypercore_agents.kit.relay.raw_response import abort_connection, raw_response_of

_log = structlog.get_logger(__name__)


class Download:
    """An ASGI application that responds with one file. Raises domain errors before the response begins."""

    def __init__(self, files: WorkspaceFiles, folder: SessionFolder, path: str) -> None:
        self._files, self._folder, self._path = files, folder, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        started = False
        try:
            async with asyncio.timeout(WHOLE_SECONDS), self._files.open(self._folder, self._path) as file:
                await send({"type": "http.response.start", "status": 200, "headers": _headers(file.size)})
                started = True
                await _send_all(file, scope, send)
        except (HypercoreError, TimeoutError, OSError) as error:
            if not started:
                raise
            _log.warning("file.cut", session_id=self._folder.session_id, error=str(error) or "the client is too slow")
            abort_connection(scope)


async def _send_all(file: OpenFile, scope: Scope, send: Send) -> None:
    disconnected = asyncio.Event()
    direct = raw_response_of(scope)
    if direct is not None:
        direct.on_disconnect(disconnected.set)
    left = file.size
    while left and not disconnected.is_set():
        piece = await file.source.read(SLOW_SECONDS, left)
        if not piece:
            raise OSError("the file became shorter while it was sent")
        left -= len(piece)
        async with asyncio.timeout(SLOW_SECONDS):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _headers(size: int) -> list[tuple[bytes, bytes]]:
    # The content is untrusted: a browser must save it, never display it.
    return [
        (b"content-type", b"application/octet-stream"),
        (b"content-length", str(size).encode()),
        (b"content-disposition", b"attachment"),
        (b"x-content-type-options", b"nosniff"),
    ]
