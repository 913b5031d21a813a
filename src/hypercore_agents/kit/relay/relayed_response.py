"""One response on its way from the upstream to the client: whole frames, masked secrets, the observer's hooks."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.kit.relay.headers import forwardable_response_headers
from hypercore_agents.kit.relay.observer import Observer, RelayOutcome
from hypercore_agents.kit.relay.raw_response import RawResponse
from hypercore_agents.kit.relay.relay_client import RelayClient
from hypercore_agents.kit.relay.upstream import UpstreamResponse

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

_FRAME_LIMIT = 1024 * 1024
_ERROR_FRAME_SECONDS = 5.0
_NO_BODY_STATUSES = frozenset((204, 304))


class RelayedResponse:
    """One response on its way to the client. Set `client` at once, and `upstream` when its head has arrived."""

    __slots__ = (
        "_before_last_called",
        "_failure",
        "_frame_torn",
        "_keep_cookies",
        "_observer",
        "_raw",
        "_secret",
        "_seen",
        "_send",
        "_tail",
        "client",
        "outcome",
        "upstream",
    )

    def __init__(self, send: Send, observer: Observer, keep_cookies: bool, raw: RawResponse | None) -> None:
        self.client: RelayClient
        self.upstream: UpstreamResponse | None = None
        self.outcome = RelayOutcome()
        self._send = send
        self._observer = observer
        self._keep_cookies = keep_cookies
        self._raw = raw
        self._secret = observer.secret
        self._tail = b""
        self._seen = 0
        self._failure: Exception | None = None
        self._before_last_called = False
        self._frame_torn = False

    @property
    def silent_seconds(self) -> float | None:
        """See ControlledResponse."""
        return self.upstream.silent_seconds if self.upstream is not None and self.outcome.status else None

    def send_frame(self, frame: bytes) -> bool:
        """See ControlledResponse."""
        upstream, raw = self.upstream, self._raw
        if upstream is None or raw is None or not self.outcome.status or not upstream.event_stream:
            return False
        if self._before_last_called or self._frame_torn or self.client.gone or not raw.writable:
            return False
        raw.write(frame)
        return True

    async def relay(self) -> None:
        """Pass on head and body. Raises a domain error when the upstream fails or the response is incomplete."""
        upstream, observer = self.upstream, self._observer
        assert upstream is not None
        await observer.on_response(upstream)
        headers = observer.headers(forwardable_response_headers(upstream.raw_headers, keep_cookies=self._keep_cookies))
        if upstream.status in _NO_BODY_STATUSES:
            headers = [pair for pair in headers if pair[0] != b"content-length"]
        self.outcome.status = upstream.status
        await self._pass({"type": "http.response.start", "status": upstream.status, "headers": headers})
        if not upstream.arrived:
            self.client.watch()
            if self._raw is not None:
                upstream.pipe(self._pass_directly)
        while chunk := await upstream.next_chunk():
            contains_end = self._observe(chunk)
            chunk = self._ready(chunk)
            if (
                upstream.event_stream
                and contains_end
                and not self._before_last_called
                and (offset := observer.last_frame_offset(chunk))
            ):
                self.outcome.sent_bytes += offset
                await self._pass({"type": "http.response.body", "body": chunk[:offset], "more_body": True})
                chunk = chunk[offset:]
            if (contains_end or (upstream.at_end and observer.end() is None)) and not self._before_last_called:
                self._before_last_called = True
                await observer.before_last()
            if not chunk:
                continue
            self.outcome.sent_bytes += len(chunk)
            if upstream.at_end and self._before_last_called and not self._tail:
                await self._pass({"type": "http.response.body", "body": chunk})
                return
            await self._pass({"type": "http.response.body", "body": chunk, "more_body": True})
        if (error := observer.end()) is not None:
            raise error
        if not self._before_last_called:
            self._before_last_called = True
            await observer.before_last()
        await self._pass({"type": "http.response.body", "body": self._masked(self._tail)})

    def _pass_directly(self, chunk: bytes) -> bool:
        """Write a chunk from the middle of the body to the client's socket; False: `next_chunk` must return it."""
        raw = self._raw
        assert raw is not None
        if self.client.gone or not raw.writable:
            return False
        try:
            if self._observer.chunk(chunk):
                self._seen = len(chunk)
                return False
        except Exception as error:
            self._failure = error  # raised where the response is read
            return False
        if chunk := self._ready(chunk):
            self.outcome.sent_bytes += len(chunk)
            raw.write(chunk)
        return True

    def _observe(self, chunk: bytes) -> bool:
        """Pass to the observer what it has not seen of a chunk; return whether the chunk contains the end."""
        if self._failure is not None:
            raise self._failure
        seen, self._seen = self._seen, 0
        if not seen:
            return self._observer.chunk(chunk)
        if len(chunk) > seen:
            self._observer.chunk(chunk[seen:])
        return True

    async def fail(self, error: HypercoreError) -> None:
        """End a response that has begun with this error. Raises the error if none has begun."""
        self.outcome.error = error
        if self.upstream is None or not self.outcome.status:
            raise error
        if self.upstream.event_stream and (frame := self._observer.error_frame(error)):
            with contextlib.suppress(TimeoutError):  # do not wait longer for a client that does not read
                async with asyncio.timeout(_ERROR_FRAME_SECONDS):
                    await self._pass({"type": "http.response.body", "body": frame})

    async def _pass(self, message: Message) -> None:
        if self.client.gone:
            return
        try:
            await self._send(message)
        except OSError:  # ASGI 2.4: the client has disconnected
            self.client.disconnected()

    def _ready(self, chunk: bytes) -> bytes:
        """Return what can be passed on after this chunk; retain the rest."""
        assert self.upstream is not None
        if self.upstream.event_stream:
            return self._masked(self._whole_frames(chunk))
        return self._without_partial_secret(chunk) if self._secret else chunk

    def _masked(self, data: bytes) -> bytes:
        secret = self._secret
        return data.replace(secret, b"*" * len(secret)) if secret and secret in data else data

    def _without_partial_secret(self, chunk: bytes) -> bytes:
        """Return all masked bytes except for a suffix that may be the beginning of the secret."""
        data, secret = self._masked(self._tail + chunk), self._secret
        last = next((size for size in range(min(len(secret) - 1, len(data)), 0, -1) if data.endswith(secret[:size])), 0)
        self._tail = data[len(data) - last :]
        return data[: len(data) - last]

    def _whole_frames(self, chunk: bytes) -> bytes:
        """Return all frames that are complete now; retain the rest, at most `_FRAME_LIMIT` bytes."""
        self._frame_torn = False
        if not self._tail and (chunk.endswith((b"\n\n", b"\r\n\r\n"))):
            return chunk
        data = self._tail + chunk
        bare, carried = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
        end = max(bare + 2 if bare >= 0 else 0, carried + 4 if carried >= 0 else 0)
        if end == 0 and len(data) > _FRAME_LIMIT:
            end = len(data)
            self._frame_torn = True
        self._tail = data[end:]
        return data[:end]
