"""Both ends of a relay for tests: an upstream that is scripted byte by byte, and an ASGI client made of two queues."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Script = Callable[["Connection"], Awaitable[None]]


@dataclass
class Connection:
    """One accepted connection of the upstream."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    number: int
    requests: list[tuple[str, dict[str, str], bytes]]

    async def request(self) -> tuple[str, dict[str, str], bytes]:
        """Read one request with its body; lower-case header names, duplicates joined by `|`.

        Requests of the gateway's health check of the Claude API are answered and not returned.
        """
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        while head[0].startswith("HEAD / "):
            await self.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers: dict[str, str] = {}
        for line in filter(None, head[1:]):
            name, _, value = line.partition(": ")
            headers[name.lower()] = f"{headers[name.lower()]}|{value}" if name.lower() in headers else value
        body = b""
        if "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readline(), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readline()
        self.requests.append((head[0], headers, body))
        return self.requests[-1]

    async def write(self, text: str | bytes) -> None:
        self.writer.write(text if isinstance(text, bytes) else text.encode())
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        await self.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def closed_by_peer(self) -> None:
        """Wait until the relay has closed this connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


@dataclass
class ScriptedUpstream:
    url: str
    connections: int = 0
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)


@contextlib.asynccontextmanager
async def scripted_upstream(script: Script) -> AsyncIterator[ScriptedUpstream]:
    """Call `script` for each connection, and close the connection when the script returns."""
    upstream = ScriptedUpstream("")
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream.connections += 1
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await script(Connection(reader, writer, upstream.connections, upstream.requests))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    upstream.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield upstream
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def echo_bodies(connection: Connection) -> None:
    """Respond to every request of a connection with the request's body."""
    while True:
        _, _, body = await connection.request()
        await connection.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


class AsgiClient:
    """The client's side of ASGI. `take_at_once=False`: each body message waits for `take()`."""

    def __init__(
        self,
        *,
        method: str = "POST",
        headers: Iterable[tuple[bytes, bytes]] = (),
        body: Iterable[bytes] = (),
        take_at_once: bool = True,
    ) -> None:
        pieces = list(body)
        head = list(headers)
        if pieces and not any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in head):
            head.append((b"content-length", str(sum(map(len, pieces))).encode()))
        self.scope: dict[str, Any] = {"type": "http", "method": method, "path": "/", "headers": head}
        self.messages: list[Any] = []
        self._incoming: asyncio.Queue[Any] = asyncio.Queue()
        self._takes = asyncio.Semaphore(0)
        self._at_once = take_at_once
        self._news = asyncio.Event()
        for number, piece in enumerate(pieces):
            self._incoming.put_nowait({"type": "http.request", "body": piece, "more_body": number < len(pieces) - 1})
        if not pieces:
            self._incoming.put_nowait({"type": "http.request", "body": b"", "more_body": False})

    async def receive(self) -> Any:
        return await self._incoming.get()

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body" and not self._at_once:
            await self._takes.acquire()
        self.messages.append(message)
        self._news.set()

    def take(self) -> None:
        self._takes.release()

    def disconnect(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():
                self._news.clear()
                await self._news.wait()

    async def until_body_ends_with(self, end: bytes) -> None:
        await self.until(lambda: self.body.endswith(end))

    async def until_response_begins(self) -> None:
        await self.until(lambda: self.status != 0)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"]) if self.messages else 0

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def complete(self) -> bool:
        return len(self.messages) > 1 and not self.messages[-1].get("more_body", False)
