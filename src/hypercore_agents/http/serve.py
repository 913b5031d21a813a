"""Serving an ASGI app with uvicorn: bound before the app starts, drained on SIGTERM.

A non-loopback address without authentication is refused here, at the one door that binds.
"""

import contextlib
import ipaddress
import os
import socket
from typing import Any

import uvicorn

from hypercore_agents.http.context import App


class AddressError(ValueError):
    """An address cannot be used; the message names the variable and the remedy."""


def parse_address(text: str, variable: str) -> tuple[str, int]:
    """Split `host:port` (or `[v6]:port`). Raises AddressError naming the variable."""
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise AddressError(f"{variable}={text!r} is not HOST:PORT, for example 127.0.0.1:8080")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Say whether a host name or address means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int, variable: str) -> socket.socket:
    """Return a bound, listening socket. Raises AddressError when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(4096)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise AddressError(
            f"cannot listen on {host}:{port} ({error.strerror}); set {variable} to a free address"
        ) from error
    return listener


async def serve(app: App | Any, listener: socket.socket, *, grace: float = 30.0) -> None:
    """Serve until SIGTERM or SIGINT; then stop accepting, let requests end for at most `grace` seconds."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(grace),
        timeout_keep_alive=75,
        lifespan="on",
        ws="none",
        h11_max_incomplete_event_size=64 * 1024,
    )
    with contextlib.closing(listener):
        await uvicorn.Server(config).serve(sockets=[listener])


def inherited(descriptor: int) -> socket.socket:
    """Return the listening socket that a parent process handed down under this descriptor."""
    os.set_inheritable(descriptor, False)
    listener = socket.socket(fileno=descriptor)
    listener.setblocking(False)
    return listener
