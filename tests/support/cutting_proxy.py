"""A TCP proxy for tests: it forwards bytes and cuts connections in the middle of their answers."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator


class CuttingProxy:
    """Cuts each connection after the next number of answer bytes in `limits`; None: never."""

    def __init__(self, port: int, limits: Iterator[int | None]) -> None:
        self.requests: list[bytes] = []
        self.url = ""
        self._port = port
        self._limits = limits
        self._connections: set[asyncio.Task[None]] = set()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection in a task of its own."""
        task = asyncio.create_task(self.serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def close(self) -> None:
        """End all connections."""
        connections = tuple(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection."""
        number, limit = len(self.requests), next(self._limits)
        self.requests.append(b"")
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except BaseException:
            writer.transport.abort()
            raise

        async def out() -> None:
            while data := await reader.read(65536):
                self.requests[number] += data
                far_writer.write(data)

        forwarding = asyncio.create_task(out())
        remaining = limit
        try:
            while (remaining is None or remaining > 0) and (data := await far_reader.read(remaining or 65536)):
                remaining = None if remaining is None else remaining - len(data)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # the client disconnected first
        finally:
            forwarding.cancel()
            await asyncio.gather(forwarding, return_exceptions=True)
            for end in (writer, far_writer):
                end.transport.abort()


@contextlib.asynccontextmanager
async def cutting_proxy(port: int, *limits: int) -> AsyncIterator[CuttingProxy]:
    """Run a proxy for a loopback port; its first connections are cut after these numbers of bytes, later ones never."""
    proxy = CuttingProxy(port, itertools.chain(limits, itertools.repeat(None)))
    async with await asyncio.start_server(proxy.accept, "127.0.0.1", 0) as server:
        proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield proxy
        finally:
            await proxy.close()
