"""Who asks: a bearer from the store or a JWT (HS256, `JWT_SECRET`), and how far each reaches.

- `admin`    everything
- `user`     things of its own user only: another's are not found, another's name in a request is forbidden
- `metrics`  metrics pages, nothing else

With authentication off everybody is an admin; the front door serves only this machine then. A JWT needs `exp`,
`sub` (the user) and `scope`; without `scope` it is a user's.

`/metrics` needs no store: a bearer that the store confirmed shortly before it failed stays good for that page, or a
failed store would look like a manager that does not answer. Nobody can revoke a bearer while the store is away.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeGuard, cast, get_args

from fastapi import Depends, Request
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import OctKey

from hypercore_agents.api.errors import Forbidden, Unauthenticated, Unavailable
from hypercore_agents.api.ids import USER_ID_PATTERN, USER_ID_RULE
from hypercore_agents.security.bearers import digest, presented
from hypercore_agents.store import bearers
from hypercore_agents.store.database import Database

ScopeName = Literal["admin", "user", "metrics"]
_ALGORITHM = "HS256"
STORE_SECONDS = 2.0
"""How long `/metrics` waits for the store."""
_CONFIRMED_SECONDS, _CONFIRMED_MOST = 600.0, 100
_LAST_SECOND = 253_402_300_799  # of the year 9999; neither NaN nor infinity is below


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request. `user_id` is set for the scope `user` only."""

    scope: ScopeName
    user_id: str | None = None

    def acting_for(self, user_id: str | None) -> str | None:
        """Return the user for whom this caller acts: its own, or whom an admin names (None: everybody).

        Raises Forbidden for another's name and for the scope `metrics`.
        """
        if self.scope == "admin":
            return user_id
        if self.scope == "metrics" or self.user_id is None:
            raise Forbidden("this credential reaches metrics only")
        if user_id is not None and user_id != self.user_id:
            raise Forbidden(f"this credential is user {self.user_id}'s and cannot act for another")
        return self.user_id

    def needs_admin(self) -> None:
        """Raise Forbidden for everybody but an admin."""
        if self.scope != "admin":
            raise Forbidden("this needs a credential of scope admin")

    def needs_metrics(self) -> None:
        """Raise Forbidden for users."""
        if self.scope not in ("admin", "metrics"):
            raise Forbidden("this needs a credential of scope metrics or admin")


class Authenticator:
    """Finds out who asks; `secret` None: authentication is off. `clock`: Unix seconds."""

    def __init__(self, database: Database, secret: str | None, clock: Callable[[], float]) -> None:
        self._database = database
        self._key = OctKey.import_key(secret) if secret is not None else None
        self._clock = clock
        self._confirmed: dict[str, tuple[float, bearers.BearerRow]] = {}
        self._failing_since: float | None = None

    async def __call__(self, request: Request, *, for_metrics: bool = False) -> Caller:
        """Return the caller. Raises Unauthenticated, and Unavailable when only the store could tell.

        `for_metrics`: a bearer that was confirmed before the store failed is good.
        """
        if self._key is None:
            return Caller("admin")
        credential = presented(request.headers.get("authorization"))
        if credential is None:
            raise Unauthenticated("send Authorization: Bearer TOKEN, a bearer of this platform or a JWT")
        if credential.count(".") == 2:
            caller = self._by_jwt(credential, self._key)
        else:
            caller = await (self._for_metrics(credential) if for_metrics else self._stored(credential))
        request.state.log = {"caller": caller.user_id or caller.scope}
        return caller

    async def _stored(self, credential: str) -> Caller:
        async with self._database.read() as connection:
            row = await bearers.get_bearer(connection, digest(credential))
        return self._caller_of(row)

    async def _for_metrics(self, credential: str) -> Caller:
        digested, now = digest(credential), self._clock()
        try:
            async with asyncio.timeout(STORE_SECONDS), self._database.read() as connection:
                row = await bearers.get_bearer(connection, digested)
        except (TimeoutError, Unavailable):
            if self._failing_since is None:
                self._failing_since = now
            at, row = self._confirmed.get(digested, (0.0, None))
            if row is None or at < self._failing_since - _CONFIRMED_SECONDS:
                raise Unavailable("the store does not answer, and only it knows this bearer") from None
            return self._caller_of(row)
        self._failing_since = None
        self._confirmed.pop(digested, None)
        caller = self._caller_of(row)
        if row is not None:
            self._confirmed[digested] = (now, row)
            if len(self._confirmed) > _CONFIRMED_MOST:
                del self._confirmed[next(iter(self._confirmed))]
        return caller

    def _caller_of(self, row: bearers.BearerRow | None) -> Caller:
        if row is None:
            raise Unauthenticated("the bearer is not known here, or was revoked")
        if row.expires_at is not None and row.expires_at <= self._clock():
            raise Unauthenticated("the bearer has expired")
        return _caller(row.scope, row.user_id)

    def _by_jwt(self, credential: str, key: OctKey) -> Caller:
        try:
            claims = jwt.decode(credential, key, algorithms=[_ALGORITHM]).claims
        except (JoseError, ValueError, RecursionError):  # the last of claims that are nested too deeply
            raise Unauthenticated("the JWT is malformed or not signed with JWT_SECRET (HS256)") from None
        now = self._clock()
        expires, not_before = claims.get("exp"), claims.get("nbf", 0)
        if not _is_time(expires) or not _is_time(not_before):
            raise Unauthenticated("the JWT needs exp, in Unix seconds, before the year 10000")
        if expires <= now or not_before > now:
            raise Unauthenticated("the JWT has expired or is not valid yet")
        return _caller(claims.get("scope", "user"), claims.get("sub"))


async def caller_of(request: Request) -> Caller:
    """Return who asks, by the app's authenticator. Raises Unauthenticated."""
    if (known := getattr(request.state, "caller", None)) is not None:
        return cast(Caller, known)  # the request has a body, and nobody's is read before they are known
    authenticator: Authenticator = request.app.state.authenticator
    return await authenticator(request)


async def metrics_reader(request: Request) -> Caller:
    """Return who asks for metrics, with the store or without. Raises Unauthenticated or Unavailable."""
    authenticator: Authenticator = request.app.state.authenticator
    return await authenticator(request, for_metrics=True)


MetricsReader = Annotated[Caller, Depends(metrics_reader)]
"""For `/metrics`: whoever sent the request, also while the store is away."""
Who = Annotated[Caller, Depends(caller_of)]
"""For routes: whoever sent the request."""


def _caller(scope: object, user_id: object) -> Caller:
    if scope == "user":
        if not isinstance(user_id, str) or re.fullmatch(USER_ID_PATTERN, user_id) is None:
            said = repr(user_id[:80]) if isinstance(user_id, str) else "missing"
            raise Unauthenticated(
                f"a credential of scope user must name its user in `sub`: {USER_ID_RULE}; this one is {said}"
            )
        return Caller("user", user_id)
    if scope == "admin":
        return Caller("admin")
    if scope == "metrics":
        return Caller("metrics")
    raise Unauthenticated(f"the credential's scope must be one of {', '.join(get_args(ScopeName))}")


def _is_time(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LAST_SECOND
