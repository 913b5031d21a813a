"""`Idempotency-Key`: a spawn or a chat that is sent again is carried out once.

A repeated request receives the response to the first one, byte for byte. The cases without such a response:

- The first request is in progress: a repeated chat fails with a retryable conflict; a repeated spawn waits for the same
  agent.
- The manager that handled it died: a repeated spawn continues with the agent that was created. A chat's turn may have
  run, tools included, and is not run a second time: the conflict names its session, which holds the turn's result.
- It ended with an error that had no effect, or its response is too large to store: the key is forgotten, and the client
  may retry. An error after the turn ran tools or produced text is stored: the turn is not run again.

A chat with a key continues when its client disconnects, so that a repeated request receives the complete response. A
key belongs to its user and route, and is valid for `RETAINED_SECONDS`. The body, with any API key in it, is compared by
its HMAC: another body with the same key is a conflict, and the store holds no digest from which a secret could be
guessed.

Rejected: running a chat again after a crash (tools have effects in the world, so a turn runs at most once).
"""

import asyncio
import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from pydantic import BaseModel

from hypercore_agents.api.errors import Conflict, HypercoreError, Unavailable
from hypercore_agents.store import idempotency
from hypercore_agents.store.database import Database
from hypercore_agents.store.idempotency import Answer, Key

_log = structlog.get_logger(__name__)

RETAINED_SECONDS = 24 * 3600.0
KEY_PATTERN = r"^[!-~]{1,255}$"
LARGEST_RESPONSE = 1024 * 1024
_ATTEMPTS, _PAUSE_SECONDS = 100, 0.05
_EVENTS = "text/event-stream"
_ACTED = re.compile(rb'"acted": ?true')
_LONGEST_MARK = len('"acted": true')


def says_acted(body: bytes) -> bool:
    """Return whether an error's body says that its turn had run tools or produced text."""
    return _ACTED.search(body) is not None


class ActedWatch:
    """Applies `says_acted` to a body that arrives in chunks."""

    def __init__(self) -> None:
        self.found = False
        self._end = b""

    def feed(self, chunk: bytes) -> None:
        """Examine the next chunk."""
        if not self.found:
            seen = self._end + chunk
            self.found = says_acted(seen)
            self._end = seen[-(_LONGEST_MARK - 1) :]


@dataclass(frozen=True)
class Stored:
    """The response to the first request."""

    status: int
    content_type: str
    body: bytes


@dataclass(frozen=True)
class Created:
    """The first request has no response yet, but has created this agent."""

    identity: str
    attempt: "Attempt"


class Attempt:
    """A request that this process handles under its key. End it with `store_response` or `abandon`."""

    def __init__(self, database: Database, key: Key, holder: str) -> None:
        self._database = database
        self._key = key
        self._holder = holder

    async def record_created(self, identity: str) -> None:
        """Record the agent or session that the request created, before the response."""
        async with self._database.write() as connection:
            await idempotency.note_made(connection, self._key, self._holder, identity)

    async def store_response(self, status: int, content_type: str, body: bytes) -> None:
        """Store the response."""
        async with self._database.write() as connection:
            content = content_type.encode() + b"\n" + body
            await idempotency.answered(connection, self._key, self._holder, status, content)

    async def abandon(self) -> None:
        """Forget the request; if it is sent again, it is carried out."""
        async with self._database.write() as connection:
            await idempotency.abandon(connection, self._key, self._holder)


class Recording:
    """Records a chat's response while it is relayed, and stores it before the last bytes are sent."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._status = 0
        self._content_type = ""
        self._pieces: list[bytes] | None = []
        self._size = 0
        self._ended = False

    async def record_created(self, session_id: str) -> None:
        """Record the session of the turn before it runs. Raises Unavailable."""
        await self._attempt.record_created(session_id)

    def begin(self, status: int, content_type: str) -> None:
        """Record the status and content type."""
        self._status, self._content_type = status, content_type

    def add(self, piece: bytes) -> None:
        """Record a piece of the body."""
        self._size += len(piece)
        if self._pieces is not None:
            self._pieces.append(piece)
            if self._size > LARGEST_RESPONSE:
                self._pieces = None

    async def failed_with(self, error: HypercoreError, request_id: str) -> None:
        """Store the manager's own error about a turn that may have run. Only the first end takes effect."""
        if not self._ended:
            self._ended = True
            body = error.body(request_id).model_dump_json(exclude_none=True).encode()
            try:
                await self._attempt.store_response(error.status, "application/json", body)
            except Unavailable:
                _log.warning("idempotency.not_stored")

    async def end(self, *, failed: bool = False) -> None:
        """Store the response, or forget the request if its response is not to be stored. Only the first end takes
        effect."""
        if self._ended:
            return
        self._ended = True
        body = b"".join(self._pieces) if self._pieces is not None else None
        bad = not 200 <= self._status < 300 or (
            body is not None and self._content_type.startswith(_EVENTS) and _ends_in_error(body)
        )
        try:
            if failed or body is None or (bad and not says_acted(body)):
                await self._attempt.abandon()
            else:
                await self._attempt.store_response(self._status, self._content_type, body)
        except Unavailable:
            _log.warning("idempotency.not_stored")


class Idempotency:
    """Claims keys for this manager process. `secret` keys the bodies' HMACs; `clock` returns Unix seconds."""

    def __init__(self, database: Database, *, holder: str, secret: bytes, clock: Callable[[], float]) -> None:
        self._database = database
        self._holder = holder
        self._secret = secret
        self._clock = clock

    async def begin(
        self, header: str, *, route: str, user_id: str, body: BaseModel, secrets: str = ""
    ) -> Attempt | Stored | Created:
        """Claim a key. `secrets`: the values that the serialised `body` masks.

        Raises Conflict for another body, for a chat in progress, and for one whose response was lost.
        """
        key = Key(user_id, route, header)
        digest = self._digest(body, secrets)
        known = await self._claim(key, digest)
        for _ in range(_ATTEMPTS if route == "spawn" else 0):  # a spawn creates its agent within moments
            if known is None or known.made is not None or known.status is not None or known.body_digest != digest:
                break
            await asyncio.sleep(_PAUSE_SECONDS)
            known = await self._claim(key, digest)
        attempt = Attempt(self._database, key, self._holder)
        if known is None:
            return attempt
        if not hmac.compare_digest(known.body_digest, digest):
            raise Conflict(
                "this Idempotency-Key was used with another request; use a new key for a new request",
                details={"field": "Idempotency-Key"},
            )
        if known.status is not None and known.answer is not None:
            content_type, _, answer = known.answer.partition(b"\n")
            return Stored(known.status, content_type.decode("latin-1"), answer)
        if known.made is not None and route == "spawn":
            return Created(known.made, attempt)
        if known.lost:
            raise Conflict(
                "the response to the first request with this Idempotency-Key was lost when its manager process ended; "
                "the turn may have run: read the session, and use a new key to continue",
                details={"session_id": known.made},
            )
        raise Conflict(
            "the first request with this Idempotency-Key is still in progress; try again soon",
            details={"field": "Idempotency-Key", **({"session_id": known.made} if known.made else {})},
            retryable=True,
            retry_after=1,
        )

    async def forget_old(self) -> None:
        """Delete keys that are no longer valid."""
        async with self._database.write() as connection:
            await idempotency.forget_before(connection, self._clock() - RETAINED_SECONDS)

    async def _claim(self, key: Key, digest: str) -> Answer | None:
        async with self._database.write(exclusive=idempotency.key_lock(key)) as connection:
            return await idempotency.claim(connection, key, digest, self._holder, now=self._clock())

    def _digest(self, body: BaseModel, secrets: str) -> str:
        content = body.model_dump_json(exclude_unset=True).encode() + b"\0" + secrets.encode()
        return hmac.new(self._secret, content, hashlib.sha256).hexdigest()


def _ends_in_error(body: bytes) -> bool:
    last = body.rstrip(b"\n").rpartition(b"\n\n")[2]
    return any(line == b"event: error" for line in last.split(b"\n"))
