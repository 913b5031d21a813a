"""The processes that `relay.py` measures: the far side, our relay's worker, and nginx's `auth_request` service.

Run as `python relay_processes.py ROLE PORT [UPSTREAM_PORT]`; several with one port share it (SO_REUSEPORT).
"""

import asyncio
import hashlib
import hmac
import socket
import sys
from typing import Any

import uvicorn

from hypercore_agents.http.context import RequestContext
from hypercore_agents.http.corking import CorkingProtocol
from hypercore_agents.http.serve import collect_rarely
from hypercore_agents.kit.relay import Limits, Relay

EVENTS, PAUSE_SECONDS = 20, 0.5
TOKEN = "benchmark-token-0123456789abcdef"
SMALL = b'{"session_id": "0c7e", "content": "a small answer", "usage": {"input_tokens": 12, "output_tokens": 7}}'
EVENT = b'event: delta\ndata: {"text": "a few words of an answer "}\n\n'
_KNOWN = {hashlib.sha256(f"{TOKEN}-{number}".encode()).hexdigest() for number in range(1000)} | {
    hashlib.sha256(TOKEN.encode()).hexdigest()
}


def allowed(scope: Any) -> bool:
    """The check that both our relay and nginx's service make: a bearer, by digest, in constant time."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            digest = hashlib.sha256(value.removeprefix(b"Bearer ")).hexdigest()
            return digest in _KNOWN and hmac.compare_digest(digest, digest)
    return False


async def far_side(scope: Any, _: Any, send: Any) -> None:
    """Answer `/stream` with events at a steady pace and anything else with a small JSON."""
    if scope["type"] != "http":
        return
    stream = scope["path"] == "/stream"
    kind = b"text/event-stream" if stream else b"application/json"
    length = [] if stream else [(b"content-length", str(len(SMALL)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind), *length]})
    if stream:
        for _ in range(EVENTS):
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
            await asyncio.sleep(PAUSE_SECONDS)
    await send({"type": "http.response.body", "body": b"" if stream else SMALL})


async def check(scope: Any, _: Any, send: Any) -> None:
    """Answer nginx's `auth_request`."""
    if scope["type"] == "http":
        status = 204 if allowed(scope) else 401
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def our_relay(upstream: int) -> Any:
    """Return what the front door puts around the relay: request id, limits, access log's bookkeeping, the check."""
    relay: Relay | None = None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal relay
        if scope["type"] != "http":
            return
        relay = relay or Relay(limits=Limits(), connections=20_000)
        if not allowed(scope):
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await relay.relay(scope, receive, send, url=f"http://127.0.0.1:{upstream}{scope['path']}")

    return RequestContext(app, quiet=("/small", "/stream"))


def main() -> None:
    """Serve one role until SIGTERM."""
    role, port = sys.argv[1], int(sys.argv[2])
    app = our_relay(int(sys.argv[3])) if role == "relay" else {"upstream": far_side, "check": check}[role]
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(8192)
    config = uvicorn.Config(  # as hypercore_agents.http.serve has it
        app, http=CorkingProtocol, log_config=None, access_log=False, server_header=False, date_header=False,
        proxy_headers=False, lifespan="off", ws="none", timeout_keep_alive=75,
    )  # fmt: skip
    collect_rarely()
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
