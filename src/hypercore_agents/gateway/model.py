"""The model routes: a session's CLI in front, the Claude API behind, and the session's limits between.

On bare ASGI, since it is on the streaming path. One SELECT before a request is sent on (one more each where
the session has a budget or the turn a limit), one INSERT before its end is passed back.

What goes on is made anew: a fixed list of headers, the key, the body as admitted. Errors have our shape with the
Messages API's `type` on top, a status that a client of that API does not retry in vain, and `x-should-retry` saying so.

A client that leaves a stream cancels it at the API and is charged for what it produced, unless the model has begun to
think: what that took is only in the stream's end, which is awaited for a while. One that leaves an unstreamed request
cancels nothing: the answer is awaited and charged, since its numbers are only in it.

What a session may spend is reserved before a request is sent (`budget.py`). What a turn may produce is checked against
the ledger, which a request reaches when it ends: requests that run at one time (`MODEL_REQUESTS_PER_SESSION` at most)
can each produce what was left when they began.
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
from hypercore_agents.gateway.input_bounds import most_input_tokens
from hypercore_agents.gateway.metering import likely_tokens, usage_number
from hypercore_agents.gateway.model_responses import DRAIN_SECONDS, Charging, ModelAnswer, UpstreamRefused, error_body
from hypercore_agents.gateway.request_rules import ModelRequest, Policy, Wish, admit, cap_output, check_betas
from hypercore_agents.http.context import Receive, Scope, Send, header, note_ids, request_id_of, span_of
from hypercore_agents.kit.limits.byte_budget import HeldBytes
from hypercore_agents.kit.relay.relay import Relay, RelayOutcome, RequestLimits
from hypercore_agents.observability.tracing import Tracing
from hypercore_agents.security.bearers import presented
from hypercore_agents.store.ledger import session_cost, turn_output

T = TypeVar("T")
_ANSWER_LIMIT = 128 * 1024 * 1024
_NEARLY = 0.1
"""Share of a budget that is left when it counts as nearly spent."""
_COUNT_LIMITS = RequestLimits(connect=10, response=30, idle=10, request_bytes=BODY_LIMIT)
_COUNT_BYTES = 64 * 1024
_COUNT_SLACK = 16
"""With a hundredth, what is added to the API's count: it is documented as an estimate that may be off a little."""
_API_VERSION = "2023-06-01"
_PASSED_HEADERS = ("accept", "user-agent", "x-app", "x-claude-code-session-id")
_QUERY = {
    "/v1/messages": {"beta"},
    "/v1/messages/count_tokens": {"beta"},
    "/v1/models": {"limit", "after_id", "before_id", "beta"},
}
ROUTES = {"/v1/messages": "POST", "/v1/messages/count_tokens": "POST", "/v1/models": "GET"}
"""The model routes and the one method of each."""


@dataclass(frozen=True)
class ModelLimits:
    """What the operator set. `default_model` is for sessions that name none."""

    policy: Policy
    default_model: str | None = None
    requests_per_session: int = 16
    seconds: float = 3600
    budget_patience: float = 60


@dataclass(frozen=True)
class _Asked:
    """One admitted request. `large`: working on its body takes long enough to be noticed by others."""

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
        """Serve one request, or answer why not."""
        started = time.perf_counter()
        try:
            await self._serve(scope, receive, send, started)
        except HypercoreError as error:
            await _send_error(send, error, request_id_of(scope))

    async def _serve(self, scope: Scope, receive: Receive, send: Send, started: float) -> None:
        path, method = scope["path"], ROUTES[scope["path"]]
        if scope["method"] != method:
            raise MethodNotAllowed(f"{path} takes {method}")
        with self._refusing("token"):
            claims = self._tokens.session(header(scope, "x-api-key") or presented(header(scope, "authorization")))
        scope["state"]["log"] = {"agent_id": claims.agent_id, "session_id": claims.session_id}
        with self._refusing("concurrency"), self._place(claims.session_id):
            with self._refusing("body"):
                query = _query(scope, path)
            with self._refusing("placement"):
                access = await self._credentials.access(claims)
            session = access.session
            note_ids(scope, user_id=session.user_id, turn=session.turn)
            # Other holders than sessions and users there are none, so their names cannot be mixed up.
            with self._bodies.budget.hold(f"session:{session.session_id}", f"user:{session.user_id}") as hold:
                with self._refusing("body"):
                    body = await self._bodies.read(scope, receive, hold)
                with self._refusing("policy"):
                    request, betas = await self._admitted(scope, access, body)
                asked = _Asked(scope, access, request, query, betas, body.large)
                del body
                charged, reservation = path == "/v1/messages", None
                if charged:
                    await self._charging.unwritten.write()
                    with self._refusing("budget"):
                        reservation = await self._cap(asked)
                try:
                    await self._pass(asked, receive, send, started, reservation, hold)
                finally:
                    if reservation is not None and not reservation.charging:
                        reservation.release()

    async def _admitted(self, scope: Scope, access: Access, body: Body) -> tuple[ModelRequest, str | None]:
        """Return the request as it may be sent, and its betas. Raises InvalidRequest or Forbidden."""
        session = access.session
        model, pseudonym = access.options.model or self._limits.default_model, self._pseudonyms.of(session.user_id)
        wish = Wish(model, session.turn_temperature, pseudonym)
        policy = self._limits.policy
        betas = check_betas(header(scope, "anthropic-beta"), wish, policy)
        if scope["method"] != "POST":
            return ModelRequest("", False, {}), betas
        counting = scope["path"].endswith("count_tokens")
        bounded = access.options.max_budget_usd is not None and not counting

        def work() -> ModelRequest:
            request = admit(body.raw, wish, policy, counting=counting)
            request.encoded()
            if bounded:
                request.most_input = most_input_tokens(request)
            return request

        return await self._bodies.work(body, access.session.session_id, work), betas

    async def _pass(
        self,
        asked: "_Asked",
        receive: Receive,
        send: Send,
        started: float,
        reservation: Reservation | None,
        hold: HeldBytes,
    ) -> None:
        scope, access, request = asked.scope, asked.access, asked.request
        has_body, charged = scope["method"] == "POST", scope["path"] == "/v1/messages"
        likely_input = await self._work(asked, lambda: likely_tokens(request.encoded())) if has_body else 0
        max_output = request.body.get("max_tokens", 0)
        observer = ModelAnswer(
            self._charging,
            access,
            request.model,
            request_id_of(scope),
            likely_input=likely_input,
            max_output=max_output,
            charged=charged,
            reservation=reservation,
            on_answer=hold.release,
        )
        headers = _headers(scope, access.key, asked.betas, has_body)
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
                url=f"{self._api_url}{scope['path']}{asked.query}",
                headers=headers,
                pass_headers=False,
                body=request.take() if has_body else None,  # nobody keeps it while the answer streams
                limits=_relay_limits(self._limits.seconds),
                observer=observer,
                on_disconnect=observer.when_client_leaves if request.stream or not charged else "drain",
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
            await observer.settle(outcome)

    async def _work(self, asked: "_Asked", work: Callable[[], T]) -> T:
        if not asked.large:
            return work()
        return await self._bodies.work(Body(b"", large=True), asked.access.session.session_id, work)

    async def _cap(self, asked: "_Asked") -> Reservation | None:
        """Hold the request to what the turn and the budget leave; return what it reserves of the budget."""
        access, request = asked.access, asked.request
        session, budget = access.session, access.options.max_budget_usd
        if session.turn_max_tokens is not None:
            async with self._charging.database.read() as connection:
                left = session.turn_max_tokens - await turn_output(connection, session.session_id, session.turn)
            if left < 1:
                raise BudgetExceeded(
                    f"this turn has produced the {session.turn_max_tokens} tokens that max_tokens allows it",
                    details={"limit": "max_tokens", "max_tokens": session.turn_max_tokens},
                )
            cap_output(request, left)
        if budget is None:
            return None

        async def count() -> int | None:
            return await self._count(asked)

        reservation, left_micro = await self._budgets.reserve(session.session_id, budget, request, count)
        if left_micro < _NEARLY * budget * 1e6:
            self._metrics.nearly_spent.inc()
        return reservation

    async def _spent(self, session_id: str) -> int:
        async with self._charging.database.read() as connection:
            return await session_cost(connection, session_id)

    async def _count(self, asked: "_Asked") -> int | None:
        """Return the API's own number of input tokens, and a little more; None where it has no such route."""
        scope, access, request = asked.scope, asked.access, asked.request
        answer = await self._relay.open(
            "POST",
            f"{self._api_url}/v1/messages/count_tokens{asked.query}",
            headers=_headers(scope, access.key, asked.betas, has_body=True),
            body=await self._work(asked, request.to_count),
            limits=_COUNT_LIMITS,
        )
        try:
            if answer.status in (404, 405, 501):
                return None
            observer = ModelAnswer(self._charging, access, request.model, request_id_of(scope), charged=False)
            await observer.on_response(answer)  # raises what the API refused with
            counted = usage_number(await answer.read(_COUNT_BYTES), "input_tokens")
        finally:
            answer.close()
        return None if counted is None else counted + counted // 100 + _COUNT_SLACK

    @contextlib.contextmanager
    def _place(self, session_id: str) -> Iterator[None]:
        if self._running[session_id] >= self._limits.requests_per_session:
            raise RateLimited(
                f"this session has {self._limits.requests_per_session} model requests running; wait for one of them",
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
    def _refusing(self, reason: str) -> Iterator[None]:
        """Count a refusal once, under the innermost reason."""
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
        raise InvalidRequest(f"{path} takes these query parameters: {', '.join(sorted(_QUERY[path]))}", field="query")
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
