"""The simulator as an ASGI app: routes, credentials, recording.

    POST /v1/messages                 an answer, streamed or not
    POST /v1/messages/count_tokens    the length of its input
    GET  /v1/models, /v1/models/{id}
    GET, HEAD /, /api/hello           probes of clients
    GET  /health
    GET, DELETE /simulator/requests   list (`session_id`, `limit`) or delete recorded requests
    GET  /simulator/stats             counts over all workers

Bare ASGI without a framework: in load tests the simulator shares the machine with the measured server.
"""

import hashlib
import hmac
import json
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from hypercore_agents.simulator import answers, request
from hypercore_agents.simulator.connection import connection_of
from hypercore_agents.simulator.conversation import read_conversation
from hypercore_agents.simulator.counts import Counts
from hypercore_agents.simulator.directives import parse_fault
from hypercore_agents.simulator.failures import ApiFailure, invalid
from hypercore_agents.simulator.settings import SimulatorSettings
from hypercore_agents.simulator.shared_state import SharedState
from hypercore_agents.simulator.streams import Send, Sender

MODELS = (
    ("claude-opus-5-5", "Claude Opus 5.5"),
    ("claude-sonnet-5-5", "Claude Sonnet 5.5"),
    ("claude-haiku-5-5", "Claude Haiku 5.5"),
    ("claude-opus-4-8", "Claude Opus 4.8"),
    ("claude-sonnet-4-6", "Claude Sonnet 4.6"),
    ("claude-haiku-4-5", "Claude Haiku 4.5"),
)
"""Models in the list; requests for any name that begins with `claude-` are answered."""

LARGEST_BODY = 32 * 1024 * 1024
_LARGEST_RECORDED_BODY = 4 * 1024 * 1024
_MOST_LISTED = 10_000
_CREDENTIAL = re.compile(r"authorization|cookie|key|token|secret")
SESSION_HEADER = "x-claude-code-session-id"


@dataclass(slots=True)
class _Arrival:
    """A received request and its outcome, for the record."""

    request_id: str
    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes = b""
    parsed: dict[str, Any] | None = None
    outcome: dict[str, Any] | None = None


class Simulator:
    """The ASGI app of one worker. `accepted_keys`: digests of the accepted API keys; None accepts any key."""

    def __init__(
        self, settings: SimulatorSettings, shared: SharedState, counts: Counts, accepted_keys: frozenset[bytes] | None
    ) -> None:
        self._settings = settings
        self._shared = shared
        self._counts = counts
        self._accepted_keys = accepted_keys
        self._defaults = answers.Defaults(
            ttft=settings.ttft,
            rate=settings.rate,
            tokens=settings.tokens,
            fault=parse_fault(settings.fault) if settings.fault is not None else None,
        )

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"the simulator supports only HTTP, not {scope['type']}")
        arrival = _Arrival(
            request_id=f"req_{secrets.token_hex(12)}",
            method=scope["method"],
            path=scope["path"],
            query=scope["query_string"].decode("latin-1"),
            headers={name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]},
        )
        sender = Sender(send, connection_of(scope), self._counts, arrival.request_id, self._settings.hang_limit)
        answer: answers.Answer | bytes
        try:
            arrival.body = await _read(receive)
            answer = self._api(arrival) if arrival.path.startswith("/v1/") else self._simulator_route(arrival)
        except ApiFailure as failure:
            arrival.outcome = {"status": failure.status, "message": failure.message}
            self._record(arrival)
            await sender.failure(failure)
            return
        self._record(arrival)
        if isinstance(answer, bytes):
            await sender.json(200, answer)
            return
        streamed = bool(arrival.parsed and arrival.parsed.get("stream"))
        del arrival  # a stream can last minutes; its request's memory is not needed any more
        if streamed:
            await sender.stream(answer)
        else:
            await sender.message(answer)

    def _api(self, arrival: _Arrival) -> answers.Answer | bytes:
        self._authenticate(arrival.headers)
        match arrival.path.removeprefix("/v1/"), arrival.method:
            case "messages", "POST":
                self._counts.request()
                return self._messages(arrival)
            case "messages/count_tokens", "POST":
                arrival.parsed = request.read_json(arrival.body)
                request.read_count(arrival.parsed)
                tokens = request.input_tokens(arrival.parsed)
                arrival.outcome = {"status": 200, "input_tokens": tokens}
                return json.dumps({"input_tokens": tokens}).encode()
            case "models", "GET":
                return _models()
            case (("messages" | "messages/count_tokens" | "models"), method):
                raise ApiFailure(405, f"Method {method} is not allowed here")
            case path, "GET" if path.startswith("models/"):
                return _model(path.removeprefix("models/"))
        raise ApiFailure(404, f"There is no {arrival.path[:200]}")

    def _messages(self, arrival: _Arrival) -> answers.Answer:
        if "anthropic-version" not in arrival.headers:
            raise invalid("anthropic-version", "header is required")
        arrival.parsed = request.read_json(arrival.body)
        message_request = request.read_messages(arrival.parsed)
        session = arrival.headers.get(SESSION_HEADER, "")
        answer = answers.answer(
            message_request,
            read_conversation(message_request),
            identity=hashlib.blake2b(arrival.body, key=session.encode()[:64], digest_size=32).hexdigest(),
            scope=session,
            input_tokens=request.input_tokens(arrival.parsed),
            defaults=self._defaults,
            attempts=self._shared.count,
        )
        arrival.outcome = {
            "status": 200 if answer.fault is None or answer.fault.after else answer.fault.status,
            "stop_reason": answer.stop_reason,
            "input_tokens": answer.input_tokens,
            "output_tokens": answer.output_tokens,
            "fault": answer.fault.kind if answer.fault is not None else None,
        }
        return answer

    def _authenticate(self, headers: dict[str, str]) -> None:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key", "").strip() or (bearer.strip() if scheme.lower() == "bearer" else "")
        if not given:
            raise ApiFailure(401, "x-api-key header is required")
        if self._accepted_keys is not None:
            digest = hashlib.sha256(given.encode()).digest()
            if not any(hmac.compare_digest(digest, accepted) for accepted in self._accepted_keys):
                raise ApiFailure(401, "invalid x-api-key")

    def _simulator_route(self, arrival: _Arrival) -> bytes:
        match arrival.method, arrival.path:
            case (("GET" | "HEAD"), ("/" | "/api/hello")):
                return json.dumps({"name": "hypercore-agents simulator", "manual": "docs/simulator.md"}).encode()
            case (("GET" | "HEAD"), "/health"):
                return json.dumps({"status": "ok"}).encode()
            case "GET", "/simulator/stats":
                return json.dumps(self._counts.totals()).encode()
            case "GET", "/simulator/requests":
                return self._recorded(parse_qs(arrival.query))
            case "DELETE", "/simulator/requests":
                self._shared.clear()
                return json.dumps({"cleared": True}).encode()
            case method, ("/" | "/api/hello" | "/health" | "/simulator/stats" | "/simulator/requests"):
                raise ApiFailure(405, f"Method {method} is not allowed here")
        raise ApiFailure(404, f"There is no {arrival.path[:200]}")

    def _recorded(self, query: dict[str, list[str]]) -> bytes:
        if not self._settings.record:
            raise ApiFailure(404, "recording is off (flag `record`)")
        unknown = set(query) - {"session_id", "limit"}
        if unknown:
            raise invalid(min(unknown), "is not a parameter; use session_id or limit")
        limit = query.get("limit", ["1000"])[-1]
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit) <= _MOST_LISTED):
            raise invalid("limit", f"must be a whole number from 1 to {_MOST_LISTED}")
        sessions = query.get("session_id")
        return json.dumps({"requests": self._shared.read(int(limit), sessions[-1] if sessions else None)}).encode()

    def _record(self, arrival: _Arrival) -> None:
        if not self._settings.record or not arrival.path.startswith("/v1/"):
            return
        with_body = arrival.parsed is not None and len(arrival.body) <= _LARGEST_RECORDED_BODY
        self._shared.record(
            {
                "time": time.time(),
                "request_id": arrival.request_id,
                "method": arrival.method,
                "path": arrival.path,
                "query": arrival.query,
                "session_id": arrival.headers.get(SESSION_HEADER),
                "headers": {name: _shown(name, value) for name, value in arrival.headers.items()},
                "body": arrival.parsed if with_body else None,
                "body_bytes": len(arrival.body),
                "answer": arrival.outcome or {"status": 200},
            }
        )


async def _read(receive: Any) -> bytes:
    parts = []
    size = 0
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise ApiFailure(400, "the client disconnected before its request was complete")
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if size > LARGEST_BODY:
            raise ApiFailure(413, f"Request exceeds the maximum size of {LARGEST_BODY} bytes")
        if not event.get("more_body", False):
            return b"".join(parts)


async def _lifespan(receive: Any, send: Send) -> None:
    while True:
        event = await receive()
        await send({"type": f"{event['type']}.complete"})
        if event["type"] == "lifespan.shutdown":
            return


def _shown(name: str, value: str) -> str:
    """Return a header's value; of a credential, its hash: `sha256:...`, after `Bearer ` if present."""
    if not _CREDENTIAL.search(name):
        return value
    scheme, separator, rest = value.partition(" ")
    prefix, secret = (f"{scheme} ", rest) if separator and name == "authorization" else ("", value)
    return f"{prefix}sha256:{hashlib.sha256(secret.encode('latin-1')).hexdigest()}"


def _models() -> bytes:
    listed = [_model_object(*model) for model in MODELS]
    return json.dumps({"data": listed, "has_more": False, "first_id": MODELS[0][0], "last_id": MODELS[-1][0]}).encode()


def _model(identity: str) -> bytes:
    for known, name in MODELS:
        if known == identity:
            return json.dumps(_model_object(known, name)).encode()
    raise ApiFailure(404, f"model: {identity[:200]}")


def _model_object(identity: str, name: str) -> dict[str, str]:
    return {"type": "model", "id": identity, "display_name": name, "created_at": "2026-01-01T00:00:00Z",
            "lifecycle": "active"}  # fmt: skip
