"""Agent and session tokens: short-lived, signed by the gateway, understood by the gateway alone.

JWT (RFC 7519), HS256. An agent token opens `/internal`; a session token opens the model routes and nothing
else, since a session's tools share the port and can read it. Neither says who the user is: the gateway
resolves that from the placement row at each request.
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
    """Who presents an agent token."""

    agent_id: str
    expires_at: float


@dataclass(frozen=True)
class SessionClaims:
    """Who presents a session token. `generation` is the placement's."""

    agent_id: str
    session_id: str
    generation: int
    expires_at: float


class TokenSigner:
    """Issues and checks agent and session tokens with one 32-byte key. Times are Unix seconds, passed in."""

    def __init__(self, key: bytes) -> None:
        self._key = OctKey.import_key(key)
        # A token is presented many times; its signature needs checking once. Its expiry is checked each time.
        self._decode = lru_cache(maxsize=_REMEMBERED)(self._decode_once)

    def agent_token(self, agent_id: str, *, now: float, lifetime: float) -> tuple[str, float]:
        """Return an agent token and when it expires."""
        return self._sign("agent", {"sub": agent_id}, now, lifetime)

    def session_token(
        self, agent_id: str, session_id: str, generation: int, *, now: float, lifetime: float
    ) -> tuple[str, float]:
        """Return a session token and when it expires."""
        return self._sign("session", {"sub": agent_id, "sid": session_id, "gen": generation}, now, lifetime)

    def check_agent_token(self, token: str, *, now: float) -> AgentClaims:
        """Return the claims. Raises Unauthenticated when the token is not ours, expired, or a session's."""
        claims = self._check("agent", token, now)
        return AgentClaims(str(claims["sub"]), float(claims["exp"]))

    def check_session_token(self, token: str, *, now: float) -> SessionClaims:
        """Return the claims. Raises Unauthenticated when the token is not ours, expired, or an agent's."""
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
                raise Unauthenticated(f"this is not {'an agent' if kind == 'agent' else 'a session'} token")
        except (JoseError, ValueError, RecursionError):
            raise Unauthenticated("the token is malformed or was not issued here") from None
        if claims["exp"] <= now:
            raise Unauthenticated("the token has expired; renew it")
        return claims
