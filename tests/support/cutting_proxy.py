"""A TCP proxy that a test owns: it passes bytes on and cuts connections in the middle of their answers."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator


class CuttingProxy:
    """Cuts each connection after so many bytes of its answer as `limits` says next; None: never."""

    def __init__(self, port: int, limits: Iterator[int | None]) -> None:
        self.requests: list[bytes] = []
        self.url = ""
        self._port = port
        self._limits = limits

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one connection on."""
        number, limit = len(self.requests), next(self._limits)
        self.requests.append(b"")
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)

        async def out() -> None:
            while data := await reader.read(65536):
                self.requests[number] += data
                far_writer.write(data)

        asking = asyncio.create_task(out())
        left = limit
        try:
            while (left is None or left > 0) and (data := await far_reader.read(65536 if left is None else left)):
                left = None if left is None else left - len(data)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # the client went first
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            for end in (writer, far_writer):
                end.transport.abort()


@contextlib.asynccontextmanager
async def cutting_proxy(port: int, *limits: int) -> AsyncIterator[CuttingProxy]:
    """Serve a proxy to a port of loopback: its first connections are cut after these bytes, later ones never."""
    proxy = CuttingProxy(port, itertools.chain(limits, itertools.repeat(None)))
    async with await asyncio.start_server(proxy.serve, "127.0.0.1", 0) as server:
        proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield proxy
