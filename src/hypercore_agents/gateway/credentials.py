"""Resolves a session token to its session and to the Claude API key that pays for the request.

A token contains only a session, an agent and a generation. One statement per request reads the rest from the store: the
user, whether session and agent are alive, the limits, the keys. So a moved session, a failed agent and a removed key
take effect at the next request.

The key is the dedicated agent's own, else the user's, else the platform's if the operator allows it. It is decrypted
here for one request and not stored.

Tokens are signed with a key derived from the primary key of the key ring and accepted under every key of the ring, so a
rotation interrupts no session; retired keys must stay in the ring for the lifetime of a token. Rejected: a separate
stored signing secret (one more secret to seal, rotate and lose).
"""

import functools
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import structlog

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.errors import Forbidden, InternalError, Unauthenticated
from hypercore_agents.api.options import SessionOptions
from hypercore_agents.security.sealing import KeyRing, Sealer, SealingError, derive_key
from hypercore_agents.security.tokens import AgentClaims, SessionClaims, TokenSigner
from hypercore_agents.store.database import Database
from hypercore_agents.store.keys import PLATFORM, agent_owner, user_owner
from hypercore_agents.store.session_lifecycle import SessionState
from hypercore_agents.store.session_tokens import get_caller
from hypercore_agents.store.sessions import SessionRow
from hypercore_agents.store.signing import note_signing

T = TypeVar("T")
KeyOwner = Literal["agent", "user", "platform"]
_log = structlog.get_logger(__name__)
_PURPOSE = "gateway/tokens"
NOTE_SECONDS = 60.0
"""Pause between two calls of `Tokens.note_signing`."""
_SERVING = (AgentState.RUNNING, AgentState.DRAINING)


@dataclass(frozen=True)
class Access:
    """The session of a model request, its options, and the key that pays for it."""

    session: SessionRow
    options: SessionOptions
    key: str = field(repr=False)
    key_owner: KeyOwner


class Tokens:
    """Issues and checks tokens under a key ring that may be rotated at any time. Times are Unix seconds."""

    def __init__(self, ring: Callable[[], KeyRing], *, agent_seconds: float, session_seconds: float) -> None:
        self._ring = ring
        self._agent_seconds = agent_seconds
        self._session_seconds = session_seconds

    async def note_signing(self, database: Database) -> None:
        """Record in the store until when tokens that are signed before the next call may be valid."""
        now = time.time()
        until = now + max(self._agent_seconds, self._session_seconds) + 2 * NOTE_SECONDS
        async with database.write(exclusive="signing") as connection:
            await note_signing(connection, self._ring().primary, until=until, now=now)

    def for_agent(self, agent_id: str) -> tuple[str, float]:
        """Return a new agent token and its expiry time."""
        return self._signers()[0].agent_token(agent_id, now=time.time(), lifetime=self._agent_seconds)

    def for_session(self, agent_id: str, session_id: str, generation: int) -> tuple[str, float]:
        """Return a new session token and its expiry time."""
        return self._signers()[0].session_token(
            agent_id, session_id, generation, now=time.time(), lifetime=self._session_seconds
        )

    def agent(self, token: str | None) -> AgentClaims:
        """Return the claims of an agent token. Raises Unauthenticated."""
        return self._check(token, "agent", lambda signer, given: signer.check_agent_token(given, now=time.time()))

    def session(self, token: str | None) -> SessionClaims:
        """Return the claims of a session token. Raises Unauthenticated."""
        return self._check(token, "session", lambda signer, given: signer.check_session_token(given, now=time.time()))

    def _check(self, token: str | None, kind: str, check: Callable[[TokenSigner, str], T]) -> T:
        if not token:
            raise Unauthenticated(f"the request has no {kind} token")
        failure: Unauthenticated | None = None
        for signer in self._signers():
            try:
                return check(signer, token)
            except Unauthenticated as error:
                failure = failure or error
        raise failure or Unauthenticated("the token is malformed or was not issued here")

    def _signers(self) -> tuple[TokenSigner, ...]:
        ring = self._ring()
        order = [ring.primary, *(key_id for key_id in ring.keys if key_id != ring.primary)]
        return _signers_of(tuple((key_id, ring.keys[key_id]) for key_id in order))


@functools.lru_cache(maxsize=8)
def _signers_of(keys: tuple[tuple[str, bytes], ...]) -> tuple[TokenSigner, ...]:
    return tuple(TokenSigner(derive_key(KeyRing(key_id, {key_id: key}), _PURPOSE)) for key_id, key in keys)


class Pseudonyms:
    """Stable pseudonyms of users, sent to the Claude API instead of their ids.

    They are derived from the primary key of the key ring, so a rotation changes them.
    """

    def __init__(self, ring: Callable[[], KeyRing]) -> None:
        self._ring = ring

    def of(self, user_id: str) -> str:
        """Return a user's pseudonym."""
        ring = self._ring()
        return hmac.new(_pseudonym_key(ring.primary, ring.keys[ring.primary]), user_id.encode(), "sha256").hexdigest()


@functools.lru_cache(maxsize=8)
def _pseudonym_key(key_id: str, key: bytes) -> bytes:
    return derive_key(KeyRing(key_id, {key_id: key}), "gateway/pseudonyms")


class Credentials:
    """Resolves session tokens to `Access`. `platform_key` is used if the store has no key of the platform."""

    def __init__(
        self, database: Database, sealer: Sealer, *, platform_key: str | None, allow_platform_key: bool
    ) -> None:
        self._database = database
        self._sealer = sealer
        self._platform_key = platform_key
        self._allow_platform_key = allow_platform_key

    async def access(self, claims: SessionClaims) -> Access:
        """Return the session's access.

        Raises Forbidden if the session is not placed on that agent in that generation, or has no key that may pay.
        """
        async with self._database.read() as connection:
            caller = await get_caller(connection, claims.session_id, claims.agent_id)
        if caller is None:
            raise Forbidden("this session is not placed on this agent")
        session = caller.placed.session
        if session.generation != claims.generation or session.state == SessionState.ENDED:
            raise Forbidden("this session has moved or ended; its token is no longer valid")
        if caller.placed.agent_state not in _SERVING:
            raise Forbidden("the agent of this session is not running")
        agent_key = caller.agent_key if caller.placed.agent_kind is AgentKind.DEDICATED else None
        key, owner = self._key(session, agent_key, caller.user_key, caller.platform_key)
        return Access(session, SessionOptions.stored(session.options), key, owner)

    def _key(
        self, session: SessionRow, agent: bytes | None, user: bytes | None, platform: bytes | None
    ) -> tuple[str, KeyOwner]:
        if agent is not None:
            return self._open(agent, agent_owner(str(session.agent_id))), "agent"
        if user is not None:
            return self._open(user, user_owner(session.user_id)), "user"
        if not self._allow_platform_key:
            raise Forbidden(
                "this user has no Claude API key and may not use the platform's: set anthropic_api_key at spawn, "
                "store a key with `hypercore-agents keys add`, or set ALLOW_PLATFORM_KEY=true"
            )
        if platform is not None:
            return self._open(platform, PLATFORM), "platform"
        if self._platform_key is None:
            raise Forbidden(
                "there is no Claude API key for this user: set ANTHROPIC_API_KEY for the gateway, store a key with "
                "`hypercore-agents keys add`, or set anthropic_api_key at spawn"
            )
        return self._platform_key, "platform"

    def _open(self, sealed: bytes, owner: str) -> str:
        try:
            return self._sealer.open(sealed, owner)
        except SealingError as error:
            _log.error("credentials.key_not_decrypted", owner=owner, error=str(error))
            raise InternalError(
                "the stored Claude API key cannot be decrypted with this gateway's key file; store it again, or check "
                "KEY_FILE",
                retryable=False,
            ) from None
