"""The one streaming relay of all three hops: front door to agent (by Host and by path), gateway to the Claude API.

Invariants:

- Bytes are passed on as they arrive, one `send` per read, and nothing is read while the client does not take what
  was sent: back-pressure reaches the other side's socket.
- A client that goes away cancels the request at the other side at once (`on_disconnect="cancel"`), or the answer is
  read to its end without it (`"drain"`), so that whoever observes it sees it whole; with `"drain_begun"` only once
  its first bytes have been passed on.
- A `text/event-stream` that fails after it began ends with an event that says so, and only whole frames were passed
  on before it, so that the event cannot melt into half a frame. Any other answer that fails is cut, so that
  framing shows the client that it is not complete.
- `Observer.before_last` has returned before the last bytes of an answer are passed on.

Work per chunk is O(1) besides the copy that a split frame needs; nothing is parsed here.

Rejected: Starlette's StreamingResponse (a task group and an iterator per stream, and it cannot watch for a
disconnect while it waits for the other side's first byte); buffering a chunk so as to know the last one (a
delta's latency).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hypercore_agents.api.errors import (
    DeadlineExceeded,
    HypercoreError,
    InvalidRequest,
    PayloadTooLarge,
    Unavailable,
    readable_size,
)
from hypercore_agents.api.internal import REQUEST_ID_HEADER
from hypercore_agents.kit.relay.connection_pool import SHORT_REQUEST_SECONDS
from hypercore_agents.kit.relay.delayed_calls import Call
from hypercore_agents.kit.relay.headers import body_length, forwardable_request_headers, forwardable_response_headers
from hypercore_agents.kit.relay.raw_response import RawResponse, raw_response_of
from hypercore_agents.kit.relay.relay_control import RelayControl
from hypercore_agents.kit.relay.time_limit import TimeLimit
from hypercore_agents.kit.relay.upstream import Peer, RequestLimits, Upstream, UpstreamResponse

__all__ = ["Observer", "Peer", "Relay", "RelayOutcome", "RequestLimits", "UpstreamResponse"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Mode = Literal["cancel", "drain", "drain_begun"]
OnDisconnect = Mode | Callable[[], Mode]
"""What becomes of a request whose client goes away; a callable is asked at that moment."""

_FRAME_LIMIT = 1024 * 1024
_FAREWELL_SECONDS = 5.0
_REQUEST_ID = REQUEST_ID_HEADER.encode()
_NO_BODY_STATUSES = frozenset((204, 304))
_NO_STATE: Mapping[str, Any] = {}


class Observer:
    """What a hop wants to see and to say while an answer passes. This one wants nothing; override what you need."""

    async def on_response(self, answer: UpstreamResponse) -> None:
        """See the status and the headers, before they are passed on; may raise a domain error to put in its place."""
        return

    def chunk(self, data: bytes) -> bool:
        """See a chunk before it is passed on; return whether the answer's end is in it. Must be quick."""
        return False

    def last_frame_offset(self, frames: bytes) -> int:
        """Return where the last bytes begin in frames of which `chunk` said that the end is in them: what comes before
        need not wait for `before_last`."""
        return 0

    def end(self) -> HypercoreError | None:
        """Say at the end of the body why the answer is not complete after all, or None."""
        return None

    async def before_last(self) -> None:
        """Do what must be done before the last bytes are passed on. Called at most once per relayed answer."""
        return

    def error_frame(self, error: HypercoreError) -> bytes:
        """Return the event with which a failed event stream ends; empty for none."""
        return b""

    def headers(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return the headers to pass on of those that may be."""
        return headers

    @property
    def secret(self) -> bytes:
        """What must not be passed on in a body: asterisks, as many as it has bytes, take its place. Empty: nothing."""
        return b""


@dataclass(slots=True)
class RelayOutcome:
    """How a relayed request ended. `status` is 0 when no answer was begun."""

    status: int = 0
    sent_bytes: int = 0
    error: HypercoreError | None = None
    client_gone: bool = False


class Relay(Upstream):
    """Relays ASGI requests to another side over pooled connections. Make one per kind of side; close it at the end."""

    def __init__(
        self,
        *,
        peer: Peer | None = None,
        limits: RequestLimits | None = None,
        connections: int = 8192,
        keep_alive: float = 30.0,
    ) -> None:
        super().__init__(
            peer=peer or Peer(), limits=limits or RequestLimits(), connections=connections, keep_alive=keep_alive
        )

    async def relay(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        url: str,
        method: str | None = None,
        headers: Iterable[tuple[str, str]] = (),
        drop: Sequence[str] = (),
        pass_headers: bool = True,
        body: bytes | None = None,
        limits: RequestLimits | None = None,
        observer: Observer | None = None,
        on_disconnect: OnDisconnect = "cancel",
        drain_seconds: float | None = None,
        keep_cookies: bool = False,
        control: RelayControl | None = None,
    ) -> RelayOutcome:
        """Send the request of this scope to `url` and pass the answer on.

        `headers` are added and take the place of the client's; `drop` names client headers that are not passed on;
        with `pass_headers=False` none are. `body` is the request's body if it was read already (then `receive` must
        have been read to the end), else it is streamed. `drain_seconds` bounds how long an answer is read on without
        its client. A `control` may add frames to the answer, or end it.

        Raises a domain error when the answer has not begun; a later failure is told in the stream (or by cutting
        it) and returned in the outcome.
        """
        limits = limits or self._limits
        state = scope.get("state", _NO_STATE)
        length = state["body_length"] if "body_length" in state else body_length(scope["headers"])
        sent = [(name.lower().encode(), value.encode()) for name, value in headers]
        if pass_headers:
            dropped = [name for name, _ in sent]
            if drop:
                dropped += [name.lower().encode() for name in drop]
            if (request_id := state.get("request_id")) is not None:
                sent.append((_REQUEST_ID, request_id.encode()))
            sent += forwardable_request_headers(scope["headers"], drop=dropped)
        direct = raw_response_of(scope)
        # its timers begin when the request lasts: most of the short ones cost none
        time_limit = TimeLimit(self.loop)
        passing = _Passing(send, observer or Observer(), keep_cookies, direct)
        client = passing.client = _Client(
            receive,
            direct,
            time_limit,
            passing.outcome,
            on_disconnect,
            drain_seconds,
            limits,
            read=body is not None or length == 0,
        )
        source = body if body is not None else client.body() if length != 0 else None
        if length is not None and length > limits.request_bytes:
            raise client.too_large()
        lasting: Call | None = None
        if control is not None:
            control.attach(passing, time_limit)
        try:
            with time_limit:
                lasting = self.lasting.call(client.lasts)
                passing.answer = await self.open(
                    method or scope["method"], url, raw_headers=sent, body=source, length=length, limits=limits
                )
                body = source = None  # an answer may stream for an hour, and the request is sent
                await passing.run()
        except TimeoutError:
            if not client.gone:
                ended = control.error if control is not None else None
                await passing.fail(
                    ended or DeadlineExceeded(f"the time allowed for the request ({limits.total} s) is over")
                )
        except HypercoreError as error:
            if not client.gone:
                await passing.fail(error)
            else:
                passing.outcome.error = error
        except asyncio.CancelledError:
            # The server stops and the request's grace is over. Its client is told, which takes a moment.
            if client.gone:
                raise
            await passing.fail(ShuttingDown())
        finally:
            if control is not None:
                control.detach()
            if lasting is not None:
                lasting.cancel()
            client.unwatch()
            if passing.answer is not None:
                passing.answer.close()
        passing.outcome.client_gone = client.gone
        return passing.outcome


class ShuttingDown(Unavailable):
    """The server stopped before the request ended. Some of it may have been done, so it is not retryable."""

    retryable = False

    def __init__(self) -> None:
        super().__init__("the server shut down before the request ended; look at what it did before you send it again")


class _Client:
    """The requesting side: its body, and the news that it has gone."""

    __slots__ = (
        "_direct",
        "_drain_seconds",
        "_limits",
        "_on_disconnect",
        "_outcome",
        "_read",
        "_receive",
        "_time_limit",
        "_watcher",
        "gone",
    )

    def __init__(
        self,
        receive: Receive,
        direct: RawResponse | None,
        time_limit: TimeLimit,
        outcome: RelayOutcome,
        on_disconnect: OnDisconnect,
        drain_seconds: float | None,
        limits: RequestLimits,
        *,
        read: bool,
    ) -> None:
        self.gone = False
        self._receive = receive
        self._direct = direct
        self._time_limit = time_limit
        self._outcome = outcome
        self._on_disconnect = on_disconnect
        self._drain_seconds = drain_seconds
        self._limits = limits
        self._watcher: asyncio.Task[None] | None = None
        self._read = None if read else asyncio.Event()

    async def body(self) -> AsyncIterator[bytes]:
        """Give the request's body as it arrives. Raises PayloadTooLarge over the limit."""
        received = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.went()
                raise InvalidRequest("the client went away in the middle of its request")
            piece = message.get("body", b"")
            received += len(piece)
            if received > self._limits.request_bytes:
                raise self.too_large()
            if piece:
                yield piece
            if not message.get("more_body", False):
                if self._read is not None:
                    self._read.set()
                return

    def lasts(self) -> None:
        """Hold the request, which began about a moment ago, to its time, and to its client."""
        if self._limits.total is not None:
            self._time_limit.set(self._limits.total - SHORT_REQUEST_SECONDS)
        self.watch()

    def watch(self) -> None:
        """Notice from now on that the client goes away, once its request is read. Safe to repeat."""
        if self._direct is not None and self._direct.request_read:
            self._direct.on_disconnect(self.went)
        elif self._watcher is None:
            self._watcher = asyncio.create_task(self._until_gone(), name="relay.watch")

    def unwatch(self) -> None:
        """Stop watching."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._direct is not None:
            self._direct.on_disconnect(None)

    async def _until_gone(self) -> None:
        if self._read is not None:
            await self._read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.went()

    def too_large(self) -> PayloadTooLarge:
        limit = self._limits.request_bytes
        return PayloadTooLarge(f"the body is larger than {readable_size(limit)}", details={"limit_bytes": limit})

    def went(self) -> None:
        """Note that the client has gone, and cancel the request where that is asked."""
        self.gone = True
        mode = self._on_disconnect if isinstance(self._on_disconnect, str) else self._on_disconnect()
        if mode == "cancel" or (mode == "drain_begun" and not self._outcome.sent_bytes):
            self._time_limit.set(0)
        elif self._drain_seconds is not None:
            self._time_limit.set(self._drain_seconds)


class _Passing:
    """One answer on its way to the client."""

    __slots__ = (
        "_direct",
        "_failure",
        "_keep_cookies",
        "_observer",
        "_secret",
        "_seen",
        "_send",
        "_tail",
        "_told",
        "_torn",
        "answer",
        "client",
        "outcome",
    )

    def __init__(self, send: Send, observer: Observer, keep_cookies: bool, direct: RawResponse | None) -> None:
        self.client: _Client
        self.answer: UpstreamResponse | None = None
        self.outcome = RelayOutcome()
        self._send = send
        self._observer = observer
        self._keep_cookies = keep_cookies
        self._direct = direct
        self._secret = observer.secret
        self._tail = b""
        self._seen = 0
        self._failure: Exception | None = None
        self._told = False
        self._torn = False

    @property
    def silent_seconds(self) -> float | None:
        """See PassingAnswer."""
        return self.answer.silent_seconds if self.answer is not None and self.outcome.status else None

    def send_frame(self, frame: bytes) -> bool:
        """See PassingAnswer."""
        answer, direct = self.answer, self._direct
        if answer is None or direct is None or not self.outcome.status or not answer.event_stream:
            return False
        if self._told or self._torn or self.client.gone or not direct.open:
            return False
        direct.write(frame)
        return True

    async def run(self) -> None:
        answer, observer = self.answer, self._observer
        assert answer is not None
        await observer.on_response(answer)
        headers = observer.headers(forwardable_response_headers(answer.raw_headers, keep_cookies=self._keep_cookies))
        if answer.status in _NO_BODY_STATUSES:
            headers = [pair for pair in headers if pair[0] != b"content-length"]
        self.outcome.status = answer.status
        await self._pass({"type": "http.response.start", "status": answer.status, "headers": headers})
        if not answer.arrived:
            self.client.watch()
            if self._direct is not None:
                answer.pipe(self._pass_directly)
        while chunk := await answer.next():
            in_sight = self._sees_end(chunk)
            chunk = self._ready(chunk)
            if answer.event_stream and in_sight and not self._told and (begins := observer.last_frame_offset(chunk)):
                self.outcome.sent_bytes += begins
                await self._pass({"type": "http.response.body", "body": chunk[:begins], "more_body": True})
                chunk = chunk[begins:]
            if (in_sight or (answer.at_end and observer.end() is None)) and not self._told:
                self._told = True
                await observer.before_last()
            if not chunk:
                continue
            self.outcome.sent_bytes += len(chunk)
            if answer.at_end and self._told and not self._tail:
                await self._pass({"type": "http.response.body", "body": chunk})
                return
            await self._pass({"type": "http.response.body", "body": chunk, "more_body": True})
        if (error := observer.end()) is not None:
            raise error
        if not self._told:
            self._told = True
            await observer.before_last()
        await self._pass({"type": "http.response.body", "body": self._masked(self._tail)})

    def _pass_directly(self, chunk: bytes) -> bool:
        """Pass a chunk of the middle on by the short way; return False for one that `next` must return."""
        direct, answer = self._direct, self.answer
        assert direct is not None
        assert answer is not None
        if self.client.gone or not direct.open:
            return False
        try:
            if self._observer.chunk(chunk):
                self._seen = len(chunk)
                return False
        except Exception as error:
            self._failure = error  # where the answer is read is where it can be told
            return False
        if chunk := self._ready(chunk):
            self.outcome.sent_bytes += len(chunk)
            direct.write(chunk)
        return True

    def _sees_end(self, chunk: bytes) -> bool:
        """Have the observer see what it has not seen of a chunk; return whether the answer's end is in it."""
        if self._failure is not None:
            raise self._failure
        seen, self._seen = self._seen, 0
        if not seen:
            return self._observer.chunk(chunk)
        if len(chunk) > seen:
            self._observer.chunk(chunk[seen:])
        return True

    async def fail(self, error: HypercoreError) -> None:
        """End what was begun with this error. Raises it when nothing was begun."""
        self.outcome.error = error
        if self.answer is None or not self.outcome.status:
            raise error
        if self.answer.event_stream and (frame := self._observer.error_frame(error)):
            with contextlib.suppress(TimeoutError):  # a client that does not read does not hold us for longer
                async with asyncio.timeout(_FAREWELL_SECONDS):
                    await self._pass({"type": "http.response.body", "body": frame})

    async def _pass(self, message: Message) -> None:
        if self.client.gone:
            return
        try:
            await self._send(message)
        except OSError:  # ASGI 2.4: the client has gone
            self.client.went()

    def _ready(self, chunk: bytes) -> bytes:
        """Return what of the answer can be passed on now that this chunk is there; keep the rest for later."""
        assert self.answer is not None
        if self.answer.event_stream:
            return self._masked(self._whole_frames(chunk))
        return self._held_back(chunk) if self._secret else chunk

    def _masked(self, data: bytes) -> bytes:
        secret = self._secret
        return data.replace(secret, b"*" * len(secret)) if secret and secret in data else data

    def _held_back(self, chunk: bytes) -> bytes:
        """Return all but an end that may be the beginning of the secret."""
        data, secret = self._masked(self._tail + chunk), self._secret
        last = next((size for size in range(min(len(secret) - 1, len(data)), 0, -1) if data.endswith(secret[:size])), 0)
        self._tail = data[len(data) - last :]
        return data[: len(data) - last]

    def _whole_frames(self, chunk: bytes) -> bytes:
        """Return all frames that are complete now; keep the rest (at most `_FRAME_LIMIT` bytes) for later."""
        self._torn = False
        if not self._tail and (chunk.endswith((b"\n\n", b"\r\n\r\n"))):
            return chunk
        data = self._tail + chunk
        bare, carried = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
        end = max(bare + 2 if bare >= 0 else 0, carried + 4 if carried >= 0 else 0)
        if end == 0 and len(data) > _FRAME_LIMIT:
            end = len(data)
            self._torn = True
        self._tail = data[end:]
        return data[:end]
