"""From a token to who calls, and whose key pays.

The token says only which session on which agent in which generation. Who its user is, whether it still lives, which
limits hold and whose key applies is read from the store at each request, in one statement. So a placement that
moved, an agent that failed and a key that was removed take effect at the next request.

Whose key: a dedicated agent's own, else the user's, else the platform's if the operator allows that. It is opened
here for one request and kept nowhere.

Tokens are signed with a key derived from the key ring's primary and accepted under every key of the ring, so that a
rotation interrupts nobody; keep retired keys in the ring for as long as a token lives. Rejected: a stored signing
secret of its own (one more secret to seal, rotate and lose).
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
"""Pause between notes of `Tokens.note_signing`."""
_SERVING = (AgentState.RUNNING, AgentState.DRAINING)


@dataclass(frozen=True)
class Access:
    """A model request's session, its options, and the key that pays for it."""

    session: SessionRow
    options: SessionOptions
    key: str = field(repr=False)
    key_owner: KeyOwner


class Tokens:
    """Issues and checks tokens under a key ring that may be rotated meanwhile. Times are Unix seconds."""

    def __init__(self, ring: Callable[[], KeyRing], *, agent_seconds: float, session_seconds: float) -> None:
        self._ring = ring
        self._agent_seconds = agent_seconds
        self._session_seconds = session_seconds

    async def note_signing(self, database: Database) -> None:
        """Note in the store until when tokens may live that are signed before the next note."""
        now = time.time()
        until = now + max(self._agent_seconds, self._session_seconds) + 2 * NOTE_SECONDS
        async with database.write(exclusive="signing") as connection:
            await note_signing(connection, self._ring().primary, until=until, now=now)

    def for_agent(self, agent_id: str) -> tuple[str, float]:
        """Return a fresh agent token and when it expires."""
        return self._signers()[0].agent_token(agent_id, now=time.time(), lifetime=self._agent_seconds)

    def for_session(self, agent_id: str, session_id: str, generation: int) -> tuple[str, float]:
        """Return a fresh session token and when it expires."""
        return self._signers()[0].session_token(
            agent_id, session_id, generation, now=time.time(), lifetime=self._session_seconds
        )

    def agent(self, token: str | None) -> AgentClaims:
        """Return what an agent token says. Raises Unauthenticated."""
        return self._check(token, "agent", lambda signer, given: signer.check_agent_token(given, now=time.time()))

    def session(self, token: str | None) -> SessionClaims:
        """Return what a session token says. Raises Unauthenticated."""
        return self._check(token, "session", lambda signer, given: signer.check_session_token(given, now=time.time()))

    def _check(self, token: str | None, kind: str, check: Callable[[TokenSigner, str], T]) -> T:
        if not token:
            raise Unauthenticated(f"no {kind} token was given")
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
    """Names users towards the Claude API: the same name for a user each time, by which nobody outside knows them.

    Derived from the key ring's primary: a rotation gives everybody a new one.
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
    """Resolves session tokens to `Access`. `platform_key` is used where the store holds none for the platform."""

    def __init__(
        self, database: Database, sealer: Sealer, *, platform_key: str | None, allow_platform_key: bool
    ) -> None:
        self._database = database
        self._sealer = sealer
        self._platform_key = platform_key
        self._allow_platform_key = allow_platform_key

    async def access(self, claims: SessionClaims) -> Access:
        """Return what the session may do and with whose key.

        Raises Forbidden when the session does not live there in that generation, or has no key that may pay.
        """
        async with self._database.read() as connection:
            caller = await get_caller(connection, claims.session_id, claims.agent_id)
        if caller is None:
            raise Forbidden("this session is not placed on this agent")
        session = caller.placed.session
        if session.generation != claims.generation or session.state == SessionState.ENDED:
            raise Forbidden("this session has moved or ended; its token is void")
        if caller.placed.agent_state not in _SERVING:
            raise Forbidden("the agent of this session does not run")
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
                "this user has no Claude API key and may not use the platform's: give anthropic_api_key at spawn, "
                "store one with `hypercore-agents keys add`, or set ALLOW_PLATFORM_KEY=true"
            )
        if platform is not None:
            return self._open(platform, PLATFORM), "platform"
        if self._platform_key is None:
            raise Forbidden(
                "there is no Claude API key for this user: set ANTHROPIC_API_KEY for the gateway, store one with "
                "`hypercore-agents keys add`, or give anthropic_api_key at spawn"
            )
        return self._platform_key, "platform"

    def _open(self, sealed: bytes, owner: str) -> str:
        try:
            return self._sealer.open(sealed, owner)
        except SealingError as error:
            _log.error("credentials.key_does_not_open", owner=owner, error=str(error))
            raise InternalError(
                "the stored Claude API key does not open with this gateway's key file; store it again, or see KEY_FILE",
                retryable=False,
            ) from None
