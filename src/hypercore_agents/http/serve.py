"""Serves an ASGI app with uvicorn: binds before the app starts, and drains on SIGTERM."""

import asyncio
import contextlib
import gc
import ipaddress
import os
import re
import resource
import socket
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from hypercore_agents.http.context import App
from hypercore_agents.http.write_coalescing import CoalescingProtocol
from hypercore_agents.kit.environment import SettingError

_HOST_AND_PORT = re.compile(r"(?:(?P<host>[A-Za-z0-9._-]{1,253})|\[(?P<v6>[0-9A-Fa-f:.]+)\]):(?P<port>[0-9]{1,5})")


class AddressError(SettingError):
    """An address cannot be used; the message names the variable and the remedy."""


def parse_address(text: str, variable: str) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port`. Raises AddressError, which names the variable."""
    found = _HOST_AND_PORT.fullmatch(text)
    if found is None or int(found["port"]) > 65535:
        hint = "; write an IPv6 address in brackets: [::1]:8080" if text.count(":") > 1 else ""
        raise AddressError(f"{variable}={text!r} is not HOST:PORT, for example 127.0.0.1:8080{hint}")
    if found["v6"] is not None:
        try:
            ipaddress.IPv6Address(found["v6"])
        except ValueError:
            raise AddressError(f"{variable}={text!r}: {found['v6']} is not an IPv6 address") from None
    return found["v6"] or found["host"], int(found["port"])


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is a loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int, variable: str) -> socket.socket:
    """Return a listening socket. Raises AddressError if the address is in use or not of this machine."""
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


def configuration(app: App | Any, **settings: Any) -> uvicorn.Config:
    """Return the configuration of every server: the platform's protocol, without the logs and headers of uvicorn.

    Each request has its own context, so log lines never contain ids of another request.
    """
    return uvicorn.Config(
        app,
        http=CoalescingProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        reset_contextvars=True,
        timeout_keep_alive=75,
        ws="none",
        **settings,
    )


async def serve(
    app: App | Any,
    listener: socket.socket,
    *,
    grace: float = 30.0,
    drain: Callable[[], Awaitable[None]] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then stop accepting connections and wait at most `grace` seconds for requests.

    With `drain`, the first signal calls it while the server still accepts requests, and the server stops when it
    returns; a second signal stops the server at once. This function then returns instead of ending the process by the
    signal. Setting `stop` also ends serving.
    """
    config = configuration(app, lifespan="on", timeout_graceful_shutdown=int(grace))
    server = uvicorn.Server(config) if drain is None else _DrainingServer(config, drain)
    raise_descriptor_limit()
    collect_rarely()
    with contextlib.closing(listener):
        watcher = None if stop is None else asyncio.create_task(_exit_when(stop, server), name="serve.stop")
        try:
            await server.serve(sockets=[listener])
        finally:
            if watcher is not None:
                watcher.cancel()


def collect_rarely() -> None:
    """Exclude loaded objects from Python's cycle collector and run it rarely.

    It takes a fifth of the time of a server that creates many short-lived objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


async def serve_beside(app: App | Any, listener: socket.socket) -> None:
    """Serve until cancelled, next to a main server that handles the process's signals and lifespan."""
    config = configuration(app, lifespan="off")
    server = _SecondaryServer(config)
    with contextlib.closing(listener):
        try:
            await server.serve(sockets=[listener])
        except asyncio.CancelledError:
            await server.shutdown(sockets=[listener])
            raise


class _SecondaryServer(uvicorn.Server):
    """Does not handle signals; the main server does."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _exit_when(stop: asyncio.Event, server: uvicorn.Server) -> None:
    await stop.wait()
    server.should_exit = True


class _DrainingServer(uvicorn.Server):
    """Drains on the first signal, then exits; exits at once on the second."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._drain = drain
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None
        self._signalled = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled:
            self.should_exit = True
            return
        self._signalled = True
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._draining = asyncio.create_task(self._drain_then_exit(), name="serve.drain")

    async def _drain_then_exit(self) -> None:
        try:
            await self._drain()
        finally:
            self.should_exit = True


def raise_descriptor_limit() -> None:
    """Raise this process's soft limit of open files to its hard limit: a relayed stream uses two descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def inherited(descriptor: int) -> socket.socket:
    """Return the listening socket inherited from the parent process under this descriptor."""
    os.set_inheritable(descriptor, False)
    listener = socket.socket(fileno=descriptor)
    listener.setblocking(False)
    return listener
