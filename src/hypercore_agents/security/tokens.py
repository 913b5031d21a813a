"""Agent and session tokens: short-lived JWTs (RFC 7519, HS256) that the gateway issues and only the gateway checks.

An agent token gives access to `/internal`. A session token gives access to the model routes only, because a session's
tools can read it and reach the same port. Neither contains the user: the gateway reads it from the session's placement
at each request.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import OctKey

from hypercore_agents.api.errors import Unauthenticated

_ALGORITHM = "HS256"
_REMEMBERED = 4096
Kind = Literal["agent", "session"]


@dataclass(frozen=True)
class AgentClaims:
    """Claims of an agent token."""

    agent_id: str
    expires_at: float


@dataclass(frozen=True)
class SessionClaims:
    """Claims of a session token. `generation` is that of the placement."""

    agent_id: str
    session_id: str
    generation: int
    expires_at: float


class TokenSigner:
    """Issues and checks agent and session tokens with one 32-byte key. Times are Unix seconds, passed in."""

    def __init__(self, key: bytes) -> None:
        self._key = OctKey.import_key(key)
        # A token is presented many times. Its signature is checked once, its expiry each time.
        self._decode = lru_cache(maxsize=_REMEMBERED)(self._decode_once)

    def agent_token(self, agent_id: str, *, now: float, lifetime: float) -> tuple[str, float]:
        """Return an agent token and its expiry time."""
        return self._sign("agent", {"sub": agent_id}, now, lifetime)

    def session_token(
        self, agent_id: str, session_id: str, generation: int, *, now: float, lifetime: float
    ) -> tuple[str, float]:
        """Return a session token and its expiry time."""
        return self._sign("session", {"sub": agent_id, "sid": session_id, "gen": generation}, now, lifetime)

    def check_agent_token(self, token: str, *, now: float) -> AgentClaims:
        """Return the claims. Raises Unauthenticated for a foreign, expired or session token."""
        claims = self._check("agent", token, now)
        return AgentClaims(str(claims["sub"]), float(claims["exp"]))

    def check_session_token(self, token: str, *, now: float) -> SessionClaims:
        """Return the claims. Raises Unauthenticated for a foreign, expired or agent token."""
        claims = self._check("session", token, now)
        return SessionClaims(str(claims["sub"]), str(claims["sid"]), int(claims["gen"]), float(claims["exp"]))

    def _sign(self, kind: Kind, claims: dict[str, Any], now: float, lifetime: float) -> tuple[str, float]:
        expires_at = now + lifetime
        payload = {**claims, "aud": kind, "iat": int(now), "exp": int(expires_at)}
        return jwt.encode({"alg": _ALGORITHM}, payload, self._key), float(int(expires_at))

    def _decode_once(self, token: str) -> dict[str, Any]:
        return jwt.decode(token, self._key, algorithms=[_ALGORITHM]).claims

    def _check(self, kind: Kind, token: str, now: float) -> dict[str, Any]:
        try:
            claims = self._decode(token)
            if claims.get("aud") != kind or not isinstance(claims.get("exp"), int):
                raise Unauthenticated(f"the token is not {'an agent' if kind == 'agent' else 'a session'} token")
        except (JoseError, ValueError, RecursionError):
            raise Unauthenticated("the token is malformed or was not issued here") from None
        if claims["exp"] <= now:
            raise Unauthenticated("the token has expired; renew it")
        return claims
