"""The model routes: relay a Claude CLI's requests to the Claude API, within the limits of its session.

Bare ASGI, because this is the streaming path. A request costs one SELECT before it is sent (one more if the session has
a budget, one more if the turn has a limit) and one INSERT before the end of its answer is passed on.

The request that is sent is built from scratch: a fixed list of headers, the key, the checked body. Errors have the
platform's shape with the Messages API's `type` at the top level, a status that clients of that API do not retry
needlessly, and `x-should-retry`.

A client that leaves a stream cancels the request at the API and is charged for the output so far, unless the model has
begun to think: only the end of the stream has the usage of thinking, so the gateway reads on for a limited time. A
client that leaves an unstreamed request cancels nothing: the answer is read and charged, because only the answer has
its usage.

The maximum cost of a request is reserved before it is sent (`budget.py`). The output of a turn is checked against the
ledger, which has a request only once it has ended: concurrent requests (at most `MODEL_REQUESTS_PER_SESSION`) can each
produce what was left when they began.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import parse_qsl

from hypercore_agents.api.errors import (
    BudgetExceeded,
    HypercoreError,
    InvalidRequest,
    MethodNotAllowed,
    RateLimited,
    Unauthenticated,
)
from hypercore_agents.gateway.bodies import BODY_LIMIT, Bodies, Body
from hypercore_agents.gateway.budget import Budgets, Reservation
from hypercore_agents.gateway.credentials import Access, Credentials, Pseudonyms, Tokens
from hypercore_agents.gateway.input_bounds import max_input_tokens
from hypercore_agents.gateway.metering import estimated_tokens, usage_number
from hypercore_agents.gateway.model_responses import DRAIN_SECONDS, Charging, ModelAnswer, UpstreamRefused, error_body
from hypercore_agents.gateway.request_rules import (
    ModelRequest,
    Policy,
    SessionRules,
    apply_rules,
    cap_output,
    check_betas,
)
from hypercore_agents.http.context import Receive, Scope, Send, header, note_ids, request_id_of, span_of
from hypercore_agents.kit.limits.byte_budget import HeldBytes
from hypercore_agents.kit.relay.relay import Relay, RelayOutcome, RequestLimits
from hypercore_agents.observability.tracing import Tracing
from hypercore_agents.security.bearers import presented
from hypercore_agents.store.ledger import session_cost, turn_output

T = TypeVar("T")
_ANSWER_LIMIT = 128 * 1024 * 1024
_NEARLY_SPENT = 0.1
"""Remaining share of a budget below which it counts as nearly spent."""
_COUNT_LIMITS = RequestLimits(connect=10, response=30, idle=10, request_bytes=BODY_LIMIT)
_COUNT_BYTES = 64 * 1024
_COUNT_SLACK = 16
"""Tokens added to the API's count, with one percent: the API documents its count as an estimate."""
_API_VERSION = "2023-06-01"
_PASSED_HEADERS = ("accept", "user-agent", "x-app", "x-claude-code-session-id")
_QUERY = {
    "/v1/messages": {"beta"},
    "/v1/messages/count_tokens": {"beta"},
    "/v1/models": {"limit", "after_id", "before_id", "beta"},
}
ROUTES = {"/v1/messages": "POST", "/v1/messages/count_tokens": "POST", "/v1/models": "GET"}
"""The model routes and the method of each."""


@dataclass(frozen=True)
class ModelLimits:
    """The operator's limits. `default_model` is the model of sessions that name none."""

    policy: Policy
    default_model: str | None = None
    requests_per_session: int = 16
    seconds: float = 3600
    budget_patience: float = 60


@dataclass(frozen=True)
class _CheckedRequest:
    """A request that passed the checks. `large`: processing its body would block the event loop noticeably."""

    scope: Scope
    access: Access
    request: ModelRequest
    query: str
    betas: str | None
    large: bool


class ModelRoutes:
    """The ASGI application of the model routes."""

    def __init__(
        self,
        *,
        api_url: str,
        relay: Relay,
        tokens: Tokens,
        credentials: Credentials,
        pseudonyms: Pseudonyms,
        charging: Charging,
        limits: ModelLimits,
        bodies: Bodies,
        tracing: Tracing | None = None,
    ) -> None:
        self._api_url = api_url
        self._relay = relay
        self._tokens = tokens
        self._credentials = credentials
        self._pseudonyms = pseudonyms
        self._charging = charging
        self._metrics = charging.metrics
        self._limits = limits
        self._bodies = bodies
        self._tracing = tracing
        self._budgets = Budgets(charging.prices, self._spent, patience=limits.budget_patience)
        self._running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or send an error."""
        started = time.perf_counter()
        try:
            await self._serve(scope, receive, send, started)
        except HypercoreError as error:
            await _send_error(send, error, request_id_of(scope))

    async def _serve(self, scope: Scope, receive: Receive, send: Send, started: float) -> None:
        path, method = scope["path"], ROUTES[scope["path"]]
        if scope["method"] != method:
            raise MethodNotAllowed(f"{path} accepts {method} only")
        with self._counting_refusals("token"):
            claims = self._tokens.session(header(scope, "x-api-key") or presented(header(scope, "authorization")))
        scope["state"]["log"] = {"agent_id": claims.agent_id, "session_id": claims.session_id}
        with self._counting_refusals("concurrency"), self._request_slot(claims.session_id):
            with self._counting_refusals("body"):
                query = _query(scope, path)
            with self._counting_refusals("placement"):
                access = await self._credentials.access(claims)
            session = access.session
            note_ids(scope, user_id=session.user_id, turn=session.turn)
            # Only sessions and users hold memory, so their names cannot collide with others.
            with self._bodies.budget.hold(f"session:{session.session_id}", f"user:{session.user_id}") as hold:
                with self._counting_refusals("body"):
                    body = await self._bodies.read(scope, receive, hold)
                with self._counting_refusals("policy"):
                    request, betas = await self._check(scope, access, body)
                checked = _CheckedRequest(scope, access, request, query, betas, body.large)
                del body
                charged, reservation = path == "/v1/messages", None
                if charged:
                    await self._charging.ledger_retry.write()
                    with self._counting_refusals("budget"):
                        reservation = await self._reserve(checked)
                try:
                    await self._forward(checked, receive, send, started, reservation, hold)
                finally:
                    if reservation is not None and not reservation.charging:
                        reservation.release()

    async def _check(self, scope: Scope, access: Access, body: Body) -> tuple[ModelRequest, str | None]:
        """Return the request to be sent and its betas. Raises InvalidRequest or Forbidden."""
        session = access.session
        model, pseudonym = access.options.model or self._limits.default_model, self._pseudonyms.of(session.user_id)
        rules = SessionRules(model, session.turn_temperature, pseudonym)
        policy = self._limits.policy
        betas = check_betas(header(scope, "anthropic-beta"), rules, policy)
        if scope["method"] != "POST":
            return ModelRequest("", False, {}), betas
        counting = scope["path"].endswith("count_tokens")
        bounded = access.options.max_budget_usd is not None and not counting

        def work() -> ModelRequest:
            request = apply_rules(body.raw, rules, policy, counting=counting)
            request.encoded()
            if bounded:
                request.max_input_tokens = max_input_tokens(request)
            return request

        return await self._bodies.work(body, access.session.session_id, work), betas

    async def _forward(
        self,
        checked: "_CheckedRequest",
        receive: Receive,
        send: Send,
        started: float,
        reservation: Reservation | None,
        hold: HeldBytes,
    ) -> None:
        scope, access, request = checked.scope, checked.access, checked.request
        has_body, charged = scope["method"] == "POST", scope["path"] == "/v1/messages"
        estimated_input = await self._work(checked, lambda: estimated_tokens(request.encoded())) if has_body else 0
        max_output = request.body.get("max_tokens", 0)
        observer = ModelAnswer(
            self._charging,
            access,
            request.model,
            request_id_of(scope),
            estimated_input=estimated_input,
            max_output=max_output,
            charged=charged,
            reservation=reservation,
            on_answer=hold.release,
        )
        headers = _headers(scope, access.key, checked.betas, has_body)
        self._metrics.overhead_seconds.observe(time.perf_counter() - started)
        above, span = span_of(scope), None
        if self._tracing is not None and above is not None:
            span = self._tracing.begin("claude_api", parent=above.traceparent, kind="client", model=request.model)
            headers.append(("traceparent", span.traceparent))
        outcome: RelayOutcome | None = None
        self._metrics.open_streams.inc()
        try:
            outcome = await self._relay.relay(
                scope,
                receive,
                send,
                url=f"{self._api_url}{scope['path']}{checked.query}",
                headers=headers,
                pass_headers=False,
                body=request.take() if has_body else None,  # freed while the answer streams
                limits=_relay_limits(self._limits.seconds),
                observer=observer,
                on_disconnect=observer.disconnect_action if request.stream or not charged else "drain",
                drain_seconds=DRAIN_SECONDS if request.stream else None,
            )
        except UpstreamRefused:
            raise
        except HypercoreError:
            self._metrics.upstream.labels("unreachable").inc()
            raise
        finally:
            if span is not None:
                broken = None if outcome is None else outcome.error
                span.end(error="refused" if outcome is None else None if broken is None else broken.type)
            self._metrics.open_streams.dec()
            await observer.finish(outcome)

    async def _work(self, checked: "_CheckedRequest", work: Callable[[], T]) -> T:
        if not checked.large:
            return work()
        return await self._bodies.work(Body(b"", large=True), checked.access.session.session_id, work)

    async def _reserve(self, checked: "_CheckedRequest") -> Reservation | None:
        """Cap the request to what the turn and the budget have left; return its reservation."""
        access, request = checked.access, checked.request
        session, budget = access.session, access.options.max_budget_usd
        if session.turn_max_tokens is not None:
            async with self._charging.database.read() as connection:
                left = session.turn_max_tokens - await turn_output(connection, session.session_id, session.turn)
            if left < 1:
                raise BudgetExceeded(
                    f"this turn has produced its maximum of {session.turn_max_tokens} tokens (max_tokens)",
                    details={"limit": "max_tokens", "max_tokens": session.turn_max_tokens},
                )
            cap_output(request, left)
        if budget is None:
            return None

        async def count() -> int | None:
            return await self._count(checked)

        reservation, left_micro = await self._budgets.reserve(session.session_id, budget, request, count)
        if left_micro < _NEARLY_SPENT * budget * 1e6:
            self._metrics.nearly_spent.inc()
        return reservation

    async def _spent(self, session_id: str) -> int:
        async with self._charging.database.read() as connection:
            return await session_cost(connection, session_id)

    async def _count(self, checked: "_CheckedRequest") -> int | None:
        """Return the API's count of input tokens plus a margin; None if the API has no route for it."""
        scope, access, request = checked.scope, checked.access, checked.request
        answer = await self._relay.open(
            "POST",
            f"{self._api_url}/v1/messages/count_tokens{checked.query}",
            headers=_headers(scope, access.key, checked.betas, has_body=True),
            body=await self._work(checked, request.to_count),
            limits=_COUNT_LIMITS,
        )
        try:
            if answer.status in (404, 405, 501):
                return None
            observer = ModelAnswer(self._charging, access, request.model, request_id_of(scope), charged=False)
            await observer.on_response(answer)  # raises the API's error
            counted = usage_number(await answer.read(_COUNT_BYTES), "input_tokens")
        finally:
            answer.close()
        return None if counted is None else counted + counted // 100 + _COUNT_SLACK

    @contextlib.contextmanager
    def _request_slot(self, session_id: str) -> Iterator[None]:
        if self._running[session_id] >= self._limits.requests_per_session:
            raise RateLimited(
                f"this session has {self._limits.requests_per_session} concurrent model requests, the maximum; "
                "wait for one of them",
                retry_after=1,
            )
        self._running[session_id] += 1
        try:
            yield
        finally:
            self._running[session_id] -= 1
            if not self._running[session_id]:
                del self._running[session_id]

    @contextlib.contextmanager
    def _counting_refusals(self, reason: str) -> Iterator[None]:
        """Count a rejected request once, under the innermost reason."""
        try:
            yield
        except HypercoreError as error:
            if not isinstance(error, UpstreamRefused) and not getattr(error, "counted", False):
                self._metrics.refusals.labels(reason).inc()
            error.counted = True  # type: ignore[attr-defined]
            raise


def _headers(scope: Scope, key: str, betas: str | None, has_body: bool) -> list[tuple[str, str]]:
    headers = [
        ("x-api-key", key),
        ("anthropic-version", header(scope, "anthropic-version") or _API_VERSION),
        ("accept-encoding", "identity"),
    ]
    if has_body:
        headers.append(("content-type", "application/json"))
    if betas:
        headers.append(("anthropic-beta", betas))
    headers.extend((name, value) for name in _PASSED_HEADERS if (value := header(scope, name)) is not None)
    return headers


def _query(scope: Scope, path: str) -> str:
    raw = bytes(scope.get("query_string", b""))
    if not raw:
        return ""
    if len(raw) > 1024 or any(name not in _QUERY[path] for name, _ in parse_qsl(raw.decode("latin-1"), True)):
        raise InvalidRequest(f"{path} accepts the query parameters {', '.join(sorted(_QUERY[path]))}", field="query")
    return f"?{raw.decode('ascii', 'replace')}"


def _relay_limits(seconds: float) -> RequestLimits:
    return RequestLimits(
        connect=10,
        response=min(600, seconds),
        idle=min(300, seconds),
        total=seconds,
        request_bytes=BODY_LIMIT,
        response_bytes=_ANSWER_LIMIT,
    )


async def _send_error(send: Send, error: HypercoreError, request_id: str) -> None:
    status, body = error.status, error_body(error, request_id)
    if isinstance(error, UpstreamRefused):
        status, body = error.http_status, error.body_of_api or body
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-should-retry", b"true" if error.retryable else b"false"),
    ]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(max(1, round(error.retry_after))).encode()))
    if isinstance(error, Unauthenticated):
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
