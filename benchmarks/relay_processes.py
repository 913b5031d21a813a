"""The processes that `relay.py` measures: the upstream, a worker with the relay, and nginx's `auth_request` service.

Run as `python relay_processes.py ROLE PORT [UPSTREAM_PORT]`. Several processes can share a port (SO_REUSEPORT).
"""

import asyncio
import hashlib
import hmac
import signal
import socket
import sys
from typing import Any, cast

import uvicorn
import uvloop
from relay_streams import EVENTS, TOKEN

from hypercore_agents.http.context import RequestContext
from hypercore_agents.http.serve import collect_rarely, configuration
from hypercore_agents.kit.relay.relay import Relay, RequestLimits

PAUSE_SECONDS = 0.5
SMALL = b'{"session_id": "0c7e", "content": "a small answer", "usage": {"input_tokens": 12, "output_tokens": 7}}'
EVENT = b'event: delta\ndata: {"text": "a few words of an answer "}\n\n'
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n%b\r\n\r\n"
_SMALL_RESPONSE = _HEAD % (b"application/json", b"content-length: %d" % len(SMALL)) + SMALL
_STREAM_HEAD = _HEAD % (b"text/event-stream", b"transfer-encoding: chunked")
_CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
_KNOWN = {hashlib.sha256(f"{TOKEN}-{number}".encode()).hexdigest() for number in range(1000)} | {
    hashlib.sha256(TOKEN.encode()).hexdigest()
}


def allowed(scope: Any) -> bool:
    """Check a bearer token by its digest in constant time, for both the relay and nginx's service."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            digest = hashlib.sha256(value.removeprefix(b"Bearer ")).hexdigest()
            return digest in _KNOWN and hmac.compare_digest(digest, digest)
    return False


class FastUpstream(asyncio.Protocol):
    """Sends events at a steady pace for `/stream` and a small JSON for all other paths.

    It uses as little CPU time as possible, because it shares the machine with the measured processes.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting = b""
        self._left = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._waiting += data
        while b"\r\n\r\n" in self._waiting:  # GETs without a body
            head, _, self._waiting = self._waiting.partition(b"\r\n\r\n")
            if head.startswith(b"GET /stream "):
                self._left = EVENTS - 1
                self._transport.write(_STREAM_HEAD + _CHUNK)
                self._timer = self._loop.call_later(PAUSE_SECONDS, self._next)
            else:
                self._transport.write(_SMALL_RESPONSE)

    def connection_lost(self, _: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _next(self) -> None:
        if not self._left:
            self._transport.write(b"0\r\n\r\n")
            return
        self._left -= 1
        self._transport.write(_CHUNK)
        self._timer = self._loop.call_later(PAUSE_SECONDS, self._next)


async def serve_upstream(listener: socket.socket) -> None:
    """Serve until SIGTERM."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    server = await loop.create_server(FastUpstream, sock=listener, backlog=8192)
    await ended.wait()
    server.close()


async def check(scope: Any, _: Any, send: Any) -> None:
    """Respond to nginx's `auth_request`."""
    if scope["type"] == "http":
        status = 204 if allowed(scope) else 401
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def relay_app(upstream: int) -> Any:
    """Return the relay with what the front door adds: request ids, limits, access log, the check."""
    relay: Relay | None = None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal relay
        if scope["type"] != "http":
            return
        relay = relay or Relay(limits=RequestLimits(), connections=20_000)
        if not allowed(scope):
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await relay.relay(scope, receive, send, url=f"http://127.0.0.1:{upstream}{scope['path']}")

    return RequestContext(app, quiet=("/small", "/stream"))


def main() -> None:
    """Serve one role until SIGTERM."""
    role, port = sys.argv[1], int(sys.argv[2])
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(8192)
    if role == "upstream":
        collect_rarely()
        uvloop.run(serve_upstream(listener))
        return
    app = relay_app(int(sys.argv[3])) if role == "relay" else check
    config = configuration(app, lifespan="off")
    collect_rarely()
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
