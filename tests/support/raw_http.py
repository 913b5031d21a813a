"""Requests as bytes on a real socket, which HTTP clients would not send."""

import asyncio
import contextlib
from urllib.parse import urlsplit


async def send_bytes(url: str, request: bytes, *, seconds: float = 20.0) -> bytes:
    """Send bytes; return what the server sends until it closes the connection."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        async with asyncio.timeout(seconds):
            with contextlib.suppress(ConnectionError):  # a server may respond and close before it has read everything
                writer.write(request)
                await writer.drain()
            answer = bytearray()
            with contextlib.suppress(ConnectionError):
                while piece := await reader.read(65536):
                    answer += piece
            return bytes(answer)
    finally:
        writer.close()


def post(path: str, *headers: str, body: bytes = b"{}", host: str = "Host: 127.0.0.1") -> bytes:
    """Return a POST of JSON with these header lines, which include its framing and may be invalid."""
    lines = [f"POST {path} HTTP/1.1", host, "Connection: close", "Content-Type: application/json", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


SECOND = b"GET /smuggled HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
"""A request that no server may process, because it is in the body of another."""

SMUGGLING = {
    "length and chunked": (("Content-Length: 4", "Transfer-Encoding: chunked"), b"0\r\n\r\n" + SECOND),
    "chunked and length": (("Transfer-Encoding: chunked", "Content-Length: 4"), b"0\r\n\r\n" + SECOND),
    "two lengths": (("Content-Length: 2", "Content-Length: 0"), b"{}" + SECOND),
    "one length twice": (("Content-Length: 2", "Content-Length: 2"), b"{}" + SECOND),
    "a list of lengths": (("Content-Length: 2, 2",), b"{}" + SECOND),
    "a signed length": (("Content-Length: +2",), b"{}" + SECOND),
    "a negative length": (("Content-Length: -2",), b"{}" + SECOND),
    "a folded header": (("X-Folded: a\r\n b", "Content-Length: 2"), b"{}" + SECOND),
    "a folded coding": (("Transfer-Encoding:\r\n chunked",), b"0\r\n\r\n" + SECOND),
    "a bare line feed": (("X-A: b\nContent-Length: 2",), b"{}" + SECOND),
    "a bare carriage return": (("X-A: b\rContent-Length: 2",), b"{}" + SECOND),
    "a space before the colon": (("Content-Length : 2",), b"{}" + SECOND),
    "a null byte": (("X-A: a\0b", "Content-Length: 2"), b"{}" + SECOND),
    "an unknown coding": (("Transfer-Encoding: xchunked",), b"0\r\n\r\n" + SECOND),
    "a second coding": (("Transfer-Encoding: gzip, chunked",), b"0\r\n\r\n" + SECOND),
    "coding twice": (("Transfer-Encoding: chunked", "Transfer-Encoding: identity"), b"0\r\n\r\n" + SECOND),
    "two hosts": (("Host: other.test", "Content-Length: 2"), b"{}" + SECOND),
    "another protocol's bytes": (("Connection: Upgrade", "Upgrade: websocket", "Content-Length: 2"), b"{}" + SECOND),
    "a bare line feed in a chunk": (("Transfer-Encoding: chunked",), b"2\n{}\n0\n\n" + SECOND),
    "a chunk of no size": (("Transfer-Encoding: chunked",), b"-1\r\n{}\r\n0\r\n\r\n" + SECOND),
    "a chunk past all sizes": (("Transfer-Encoding: chunked",), b"ffffffffffffffffff\r\n{}\r\n0\r\n\r\n" + SECOND),
}
"""Ambiguous framings: header lines and the bytes that follow them."""
