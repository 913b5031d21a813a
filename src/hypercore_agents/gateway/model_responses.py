"""Processes answers of the Claude API: meters them, charges them before their end is passed on, rewrites their errors.

Invariants:

- A 2xx answer is charged exactly once. If it is complete, it is in the ledger before its last bytes are sent. If it is
  cut, it is charged for its output so far. A cut answer with output that cannot be counted (the model's thinking) is
  charged for the maximum output (`max_tokens`); therefore a client that leaves does not cut it, and the gateway reads
  on to its usage, for at most `DRAIN_SECONDS`. An error is not charged.
- If the ledger cannot be written (three attempts), the answer ends with an error, so no client sees the end of a turn
  whose usage is missing. The entry is retried later (`ledger_retry.py`).
- The key that paid appears nowhere in what is sent back.
- A stream that breaks never looks complete. If a retry can help, the connection is cut in the middle of the answer (an
  error of HTTP's framing). This, and not an `error` event, makes the Claude CLI repeat the request and emit
  `message_start` again (measured with 2.1.330; after an event, it fails the turn or repeats it once without streaming).
  If a retry cannot help, the stream ends with an `error` event.
"""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import structlog

from hypercore_agents.api.errors import HypercoreError, ModelFailed, Unavailable
from hypercore_agents.gateway.budget import Reservation
from hypercore_agents.gateway.credentials import Access
from hypercore_agents.gateway.ledger_retry import LedgerRetry
from hypercore_agents.gateway.metering import JsonMeter, Meter, StreamMeter, Tokens
from hypercore_agents.gateway.pricing import PriceList
from hypercore_agents.gateway.rate_limit_headroom import RateLimitHeadroom
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.kit.relay.relay import Observer, RelayOutcome, UpstreamResponse
from hypercore_agents.observability.metrics import GatewayMetrics
from hypercore_agents.store.database import Database
from hypercore_agents.store.ledger import LedgerEntry, add_entry

_log = structlog.get_logger(__name__)
_ERROR_LIMIT = 64 * 1024
_LEDGER_PAUSES = (0.0, 0.1, 0.5)
_STOP = b"\nevent: message_stop"
_PASSED_HEADERS = frozenset(
    (b"cache-control", b"content-encoding", b"content-length", b"content-type", b"date", b"request-id", b"retry-after")
)
_PASSED_PREFIXES = (b"anthropic-ratelimit-", b"anthropic-fast-")
_SHORTEST_KEY = 8
DRAIN_SECONDS = 120.0
"""Maximum time for which an answer is read after its client left."""
COMPLETE, CUT = "complete", "cut"


class UpstreamRefused(ModelFailed):
    """An error of the Claude API, to be passed on with its status and, if it is an error object, its body."""

    def __init__(self, message: str, *, status: int, api_status: int, body: bytes | None, retry_after: float | None):
        super().__init__(message, details={"api_status": api_status}, retry_after=retry_after)
        self.http_status = status
        self.body_of_api = body
        self.retryable = api_status == 429 or api_status >= 500


@dataclass(frozen=True)
class Charging:
    """What is needed to charge answers; one per gateway."""

    database: Database
    prices: PriceList
    metrics: GatewayMetrics
    tasks: Tasks
    rate_limit_headroom: RateLimitHeadroom
    ledger_retry: LedgerRetry


def error_frame(error: HypercoreError, request_id: str) -> bytes:
    """Return the `error` event that ends a broken stream, in the platform's and the Messages API's shape at once."""
    return b"event: error\ndata: " + error_body(error, request_id) + b"\n\n"


def error_body(error: HypercoreError, request_id: str) -> bytes:
    """Return an error in the platform's shape, with the top-level `type` that clients of the Messages API expect."""
    return json.dumps({"type": "error", **error.body(request_id).model_dump(mode="json", exclude_none=True)}).encode()


class ModelAnswer(Observer):
    """Observes one answer. `charged=False` for routes that are free. `on_answer` is called when the answer begins."""

    def __init__(
        self,
        charging: Charging,
        access: Access,
        model: str,
        request_id: str,
        *,
        estimated_input: int = 0,
        max_output: int = 0,
        charged: bool,
        reservation: Reservation | None = None,
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:
        self._charging = charging
        self._access = access
        self._model = model
        self._request_id = request_id
        self._likely_input = estimated_input
        self._max_output = max_output
        self._charged = charged
        self._reservation = reservation
        self._on_answer = on_answer
        self._meter: Meter | None = None
        self._finished = False
        self._sent_at = time.perf_counter()

    async def on_response(self, answer: UpstreamResponse) -> None:
        """Choose a meter for a 2xx answer; read and raise any other as UpstreamRefused."""
        self._on_answer()
        metrics = self._charging.metrics
        metrics.upstream.labels(_status_label(answer.status)).inc()
        metrics.answer_seconds.observe(time.perf_counter() - self._sent_at)
        if self._access.key_owner == "platform":
            self._charging.rate_limit_headroom.observe(answer.status, answer.headers)
        if not 200 <= answer.status < 300:
            raise await self._refused(answer)
        if self._charged:
            self._meter = StreamMeter() if answer.event_stream else JsonMeter()

    def chunk(self, data: bytes) -> bool:
        """Meter a chunk."""
        return self._meter.feed(data) if self._meter is not None else False

    def last_frame_offset(self, frames: bytes) -> int:
        """Return the offset of `message_stop`: what comes before it is sent while the charge is written."""
        return frames.find(_STOP) + 1

    def end(self) -> HypercoreError | None:
        """Return an error if a stream ended before its `message_stop`, unless the stream ended with its own error."""
        if isinstance(self._meter, StreamMeter) and not self._meter.complete and not self._meter.failed:
            return Unavailable("the Claude API ended its stream before the answer was complete", retry_after=1)
        return None

    async def before_last(self) -> None:
        """Charge the answer. Raises Unavailable if the ledger cannot be written."""
        await self._charge_answer(self._meter)

    def error_frame(self, error: HypercoreError) -> bytes:
        """Return the event that ends a broken stream; empty, so that the connection is cut, if the CLI should retry."""
        return b"" if error.retryable else error_frame(error, self._request_id)

    def disconnect_action(self) -> Literal["cancel", "drain"]:
        """Return `drain`, to read on to the usage, if there is output that only the API can count; else `cancel`."""
        return "drain" if self._charged and self._meter is not None and self._meter.uncounted else "cancel"

    def headers(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return the headers that clients of the Messages API use, without any that contains the key.

        The others concern only the account of the key, or make a proxy or client act: `location`, `x-accel-redirect`,
        `www-authenticate`.
        """
        key = self.secret
        return [
            (name, value)
            for name, value in headers
            if (name in _PASSED_HEADERS or name.startswith(_PASSED_PREFIXES))
            and not (key and (key in value or key in name))
        ]

    @property
    def secret(self) -> bytes:
        """The key that paid; empty if it is so short that it could occur in any text."""
        key = self._access.key.encode()
        return key if len(key) >= _SHORTEST_KEY else b""

    async def finish(self, outcome: RelayOutcome | None) -> None:
        """Charge an answer that was cut, so that `before_last` did not charge it. Raises no error of the ledger."""
        if not self._charged or self._finished:
            return
        if self._meter is not None:
            self._charging.metrics.upstream.labels("cut").inc()
        elif outcome is None or not outcome.client_gone:
            return
        try:
            await self._charge_answer(self._meter)
        except HypercoreError:
            return

    async def _charge_answer(self, meter: Meter | None) -> None:
        if not self._charged or self._finished:
            return
        self._finished = True
        tokens = meter.tokens() if meter is not None else Tokens()
        if meter is not None and meter.failed and not meter.started:
            return  # the API had not begun the answer
        if meter is None or not meter.started:  # cut before the API reported the input, which it had received
            tokens.input = self._likely_input
        outcome = COMPLETE if meter is not None and meter.complete else CUT
        reservation = self._reservation
        if outcome == CUT:  # an estimate, limited by what was reserved
            most = self._max_output if reservation is None else reservation.output_tokens
            tokens.output = most if meter is not None and meter.uncounted else min(tokens.output, most)
            if reservation is not None:
                tokens.input = min(tokens.input, reservation.input_tokens)
        entry = self._entry(tokens, outcome)
        if outcome == CUT and reservation is not None:  # uses of API-run tools
            entry = replace(entry, cost_micro_usd=min(entry.cost_micro_usd, reservation.max_micro_usd))
        try:
            work = self._charging.tasks.start("charge", self._charge(entry))
        except RuntimeError:  # the gateway has ended
            _log.error("ledger.write_failed", **vars(entry))
            raise
        if reservation is not None:
            reservation.charging = True  # `_charge` releases it
        try:
            self._count(entry, tokens)
        finally:
            await asyncio.shield(work)

    def _entry(self, tokens: Tokens, outcome: str) -> LedgerEntry:
        """Return the ledger entry of the answer."""
        session = self._access.session
        return LedgerEntry(
            created_at=time.time(),
            user_id=session.user_id,
            agent_id=str(session.agent_id),
            session_id=session.session_id,
            turn=session.turn,
            model=self._model,
            input_tokens=tokens.input,
            output_tokens=tokens.output,
            cache_read_tokens=tokens.cache_read,
            cache_creation_tokens=tokens.cache_creation,
            cost_micro_usd=self._charging.prices.cost_micro_usd(self._model, tokens),
            outcome=outcome,
            charge_id=str(uuid.uuid4()),
        )

    def _count(self, entry: LedgerEntry, tokens: Tokens) -> None:
        """Count a charge in the metrics."""
        metrics = self._charging.metrics
        model = self._charging.prices.name_of(self._model) or metrics.OTHER_MODEL
        for kind, count in (
            ("input", tokens.input),
            ("output", tokens.output),
            ("cache_read", tokens.cache_read),
            ("cache_creation", tokens.cache_creation),
        ):
            metrics.tokens.labels(model, kind).inc(count)
        metrics.cost.labels(model).inc(entry.cost_micro_usd / 1e6)

    async def _charge(self, entry: LedgerEntry) -> None:
        reservation = self._reservation
        try:
            async with reservation.lock if reservation is not None else contextlib.nullcontext():
                try:
                    await self._write(entry)
                except Unavailable:
                    if reservation is not None:
                        reservation.release(unbilled=entry.cost_micro_usd)
                    raise
                if reservation is not None:
                    reservation.release()  # under the lock
        except asyncio.CancelledError:  # the gateway ends; the entry may or may not be in the ledger
            _log.error("ledger.write_failed", **vars(entry))
            raise
        finally:
            if reservation is not None:
                reservation.release()

    async def _write(self, entry: LedgerEntry) -> None:
        for pause in _LEDGER_PAUSES:
            await asyncio.sleep(pause)
            try:
                async with self._charging.database.write_one() as connection:
                    await add_entry(connection, entry)
                return
            except Unavailable as error:
                failure = error
        self._charging.metrics.unbilled.inc()
        self._charging.ledger_retry.add(entry, self._reservation)
        raise failure

    async def _refused(self, answer: UpstreamResponse) -> UpstreamRefused:
        try:
            body = await answer.read(_ERROR_LIMIT)
        except HypercoreError:
            body = b""
        status = answer.status
        if status in (401, 403):
            whose = {"agent": "of this agent", "user": "of this user", "platform": "of the platform"}
            return UpstreamRefused(
                f"the Claude API rejected the key {whose[self._access.key_owner]} (status {status}): replace it",
                status=403,
                api_status=status,
                body=None,
                retry_after=None,
            )
        safe = body.replace(self._access.key.encode(), b"[masked]")
        return UpstreamRefused(
            f"the Claude API answered with status {status}",
            status=status if status >= 400 else 502,
            api_status=status,
            body=safe if _is_error(safe) else None,
            retry_after=_seconds(answer.headers.get("retry-after")),
        )


def _is_error(body: bytes) -> bool:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.get("type") == "error" and isinstance(value.get("error"), dict)


def _seconds(header: str | None) -> float | None:
    return float(header) if header is not None and header.isdigit() and len(header) < 7 else None


def _status_label(status: int) -> str:
    return "429" if status == 429 else f"{status // 100}xx" if 200 <= status < 600 else "5xx"
