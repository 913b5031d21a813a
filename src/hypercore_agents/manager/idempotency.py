"""`Idempotency-Key`: a spawn or a chat that is sent again is done once.

A repeated request gets the first one's answer, byte for byte. What that answer cannot be had for:

- The first is still being answered: a chat is a conflict to try again soon; a spawn waits for the same agent.
- The manager that answered died: a spawn goes on with the agent that was made. A chat's turn may have run, tools
  included, and is not run a second time: a conflict names its session, which has whatever came of it.
- The first ended with an error that had no effect, or with an answer too large to keep: it is forgotten, and the client
  decides. An error after tools ran or text was said is kept: the turn is not run again.

A chat with a key goes on when its client is gone, so that the client that asks again gets the whole answer. A key
belongs to its user and route, and holds for `KEPT_SECONDS`. The body counts as an HMAC, an API key in it included:
another body under the same key is a conflict, and no digest of a secret that could be guessed at is stored.

Rejected: running a chat again after a crash (tools have effects in the world, so at most once is the promise).
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

KEPT_SECONDS = 24 * 3600.0
KEY_PATTERN = r"^[!-~]{1,255}$"
LARGEST_ANSWER = 1024 * 1024
_LOOKS, _LOOK_SECONDS = 100, 0.05
_EVENTS = "text/event-stream"
_ACTED = re.compile(rb'"acted": ?true')
_LONGEST_MARK = len('"acted": true')


def says_acted(body: bytes) -> bool:
    """Say whether the body of an error is that of a turn that ran tools or said text."""
    return _ACTED.search(body) is not None


class ActedWatch:
    """Looks for the mark of `says_acted` in a body that comes in chunks, wherever it is cut."""

    def __init__(self) -> None:
        self.found = False
        self._end = b""

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk."""
        if not self.found:
            seen = self._end + chunk
            self.found = says_acted(seen)
            self._end = seen[-(_LONGEST_MARK - 1) :]


@dataclass(frozen=True)
class Stored:
    """The first request's answer."""

    status: int
    content_type: str
    body: bytes


@dataclass(frozen=True)
class Made:
    """The first request is not answered, but this is what it made."""

    identity: str
    attempt: "Attempt"


class Attempt:
    """A request that this process answers under its key. End it with `answered` or `abandon`."""

    def __init__(self, database: Database, key: Key, holder: str) -> None:
        self._database = database
        self._key = key
        self._holder = holder

    async def made(self, identity: str) -> None:
        """Note which agent or session came of the request, before it is answered."""
        async with self._database.write() as connection:
            await idempotency.note_made(connection, self._key, self._holder, identity)

    async def answered(self, status: int, content_type: str, body: bytes) -> None:
        """Keep the answer."""
        async with self._database.write() as connection:
            content = content_type.encode() + b"\n" + body
            await idempotency.answered(connection, self._key, self._holder, status, content)

    async def abandon(self) -> None:
        """Forget the request: it may be sent again and is then done anew."""
        async with self._database.write() as connection:
            await idempotency.abandon(connection, self._key, self._holder)


class Recording:
    """A chat's answer as it passes, kept under its key before its last bytes are passed on."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._status = 0
        self._content_type = ""
        self._pieces: list[bytes] | None = []
        self._size = 0
        self._ended = False

    async def made(self, session_id: str) -> None:
        """Note the session of the turn, before it runs. Raises Unavailable."""
        await self._attempt.made(session_id)

    def begin(self, status: int, content_type: str) -> None:
        """See the answer's head."""
        self._status, self._content_type = status, content_type

    def add(self, piece: bytes) -> None:
        """See a piece of its body."""
        self._size += len(piece)
        if self._pieces is not None:
            self._pieces.append(piece)
            if self._size > LARGEST_ANSWER:
                self._pieces = None

    async def failed_with(self, error: HypercoreError, request_id: str) -> None:
        """Keep an error that the manager itself made of a turn that may have run. Only the first end counts."""
        if not self._ended:
            self._ended = True
            body = error.body(request_id).model_dump_json(exclude_none=True).encode()
            try:
                await self._attempt.answered(error.status, "application/json", body)
            except Unavailable:
                _log.warning("idempotency.not_kept")

    async def end(self, *, failed: bool = False) -> None:
        """Keep the answer, or forget the request if it has none worth keeping. Only the first call counts."""
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
                await self._attempt.answered(self._status, self._content_type, body)
        except Unavailable:
            _log.warning("idempotency.not_kept")


class Idempotency:
    """Claims keys for this manager process. `secret` makes the bodies' digests; `clock` returns Unix seconds."""

    def __init__(self, database: Database, *, holder: str, secret: bytes, clock: Callable[[], float]) -> None:
        self._database = database
        self._holder = holder
        self._secret = secret
        self._clock = clock

    async def begin(
        self, header: str, *, route: str, user_id: str, body: BaseModel, secrets: str = ""
    ) -> Attempt | Stored | Made:
        """Claim a key. `secrets` is what `body` masks when it is written down.

        Raises Conflict for another body, for a chat that is still being answered and for one whose answer was lost.
        """
        key = Key(user_id, route, header)
        digest = self._digest(body, secrets)
        known = await self._claim(key, digest)
        for _ in range(_LOOKS if route == "spawn" else 0):  # what a spawn makes, it makes at once
            if known is None or known.made is not None or known.status is not None or known.body_digest != digest:
                break
            await asyncio.sleep(_LOOK_SECONDS)
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
            return Made(known.made, attempt)
        if known.lost:
            raise Conflict(
                "the answer to the first request with this Idempotency-Key was lost with the manager that made it; its "
                "turn may have run: look at the session, and use a new key to go on",
                details={"session_id": known.made},
            )
        raise Conflict(
            "the first request with this Idempotency-Key is still being answered; try again soon",
            details={"field": "Idempotency-Key", **({"session_id": known.made} if known.made else {})},
            retryable=True,
            retry_after=1,
        )

    async def forget_old(self) -> None:
        """Forget keys after their day."""
        async with self._database.write() as connection:
            await idempotency.forget_before(connection, self._clock() - KEPT_SECONDS)

    async def _claim(self, key: Key, digest: str) -> Answer | None:
        async with self._database.write(exclusive=idempotency.key_lock(key)) as connection:
            return await idempotency.claim(connection, key, digest, self._holder, now=self._clock())

    def _digest(self, body: BaseModel, secrets: str) -> str:
        said = body.model_dump_json(exclude_unset=True).encode() + b"\0" + secrets.encode()
        return hmac.new(self._secret, said, hashlib.sha256).hexdigest()


def _ends_in_error(body: bytes) -> bool:
    last = body.rstrip(b"\n").rpartition(b"\n\n")[2]
    return any(line == b"event: error" for line in last.split(b"\n"))
