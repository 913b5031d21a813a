"""`POST /internal/sessions/{id}/transcript` on bare ASGI, because the answer of every turn waits for this request.

FastAPI's overhead (five middlewares, a body parsed twice, dependencies) took as long as the store's work.
`session_archives.py` does the work; `RequestContext` turns errors into HTTP, as it does for the model routes.
"""

import re

from pydantic import ValidationError

from hypercore_agents.api.errors import InvalidRequest
from hypercore_agents.api.ids import SESSION_ID_PATTERN
from hypercore_agents.api.internal import TranscriptAppend
from hypercore_agents.gateway.credentials import Tokens
from hypercore_agents.gateway.session_archives import Archives
from hypercore_agents.http.context import App, Receive, Scope, Send, header
from hypercore_agents.http.validation_errors import describe_faults
from hypercore_agents.kit.limits.byte_budget import ByteBudget, HeldBytes
from hypercore_agents.kit.limits.json_bounds import JsonBounds
from hypercore_agents.security.bearers import presented

_VALUES_LIMIT = 20_000
"""JSON values of a request: ten times as many as 1,000 entries and 1,000 events have."""
_PATH = re.compile(rf"/internal/sessions/({SESSION_ID_PATTERN[1:-1]})/transcript")


class TranscriptAppendRoute:
    """The ASGI application of the route. `otherwise` serves the other methods of its path.

    `budget` limits the memory of bodies, because an agent's server runs inside the sandbox and is not trusted.
    """

    def __init__(self, tokens: Tokens, archives: Archives, budget: ByteBudget, otherwise: App) -> None:
        self._tokens = tokens
        self._archives = archives
        self._budget = budget
        self._otherwise = otherwise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises Unauthenticated and the errors of `Archives.append`."""
        if scope["method"] != "POST":
            await self._otherwise(scope, receive, send)
            return
        agent_id = self._tokens.agent(presented(header(scope, "authorization"))).agent_id
        path = _PATH.fullmatch(scope["path"])
        if path is None:
            raise InvalidRequest("session_id: must be a UUID in lower case", field="session_id")
        with self._budget.hold(f"agent:{agent_id}") as hold:
            if length := scope["state"]["body_length"]:
                await hold.take(length)
            request = _parse(await _body(receive, None if length is not None else hold))
            taken = await self._archives.append(agent_id, path[1], request)
        body = taken.model_dump_json().encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _parse(body: bytes) -> TranscriptAppend:
    try:
        return TranscriptAppend.model_validate_json(body)
    except ValidationError as error:
        raise describe_faults(error.errors(include_url=False)) from None


async def _body(receive: Receive, hold: HeldBytes | None) -> bytes:
    """Return the body; `hold` grows with it if the request did not declare its length."""
    bounds, pieces = JsonBounds(_VALUES_LIMIT), []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("the client disconnected before the end of its request")
        piece = message.get("body", b"")
        if hold is not None:
            hold.grow(len(piece))
        bounds.feed(piece)
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)
