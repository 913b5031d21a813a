"""Authentication of requests by a bearer from the store or a JWT (HS256, `JWT_SECRET`), and the scopes of callers.

- `admin`    everything
- `user`     only its own user's resources: another user's are not found, another user's name is forbidden
- `metrics`  metrics pages only

With authentication off every caller is an admin; the front door then serves only this machine. A JWT needs `exp` and,
for the scope `user`, `sub` (the user). `scope` defaults to `user`.

`/metrics` works without the store: a bearer that the store confirmed shortly before it failed stays valid for that
page. Otherwise Prometheus would report a failed store as a manager that is down. A bearer cannot be revoked while the
store is unavailable anyway.
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
"""Maximum wait of `/metrics` for the store."""
_CONFIRMED_SECONDS, _CONFIRMED_MOST = 600.0, 100
_LAST_SECOND = 253_402_300_799  # of the year 9999; NaN and infinity are not below it


@dataclass(frozen=True)
class Caller:
    """The authenticated sender of a request. `user_id` is set for the scope `user` only."""

    scope: ScopeName
    user_id: str | None = None

    def acting_for(self, user_id: str | None) -> str | None:
        """Return the user for whom this caller acts: its own user, or the one that an admin names (None: all users).

        Raises Forbidden for another user's name and for the scope `metrics`.
        """
        if self.scope == "admin":
            return user_id
        if self.scope == "metrics" or self.user_id is None:
            raise Forbidden("this credential gives access to metrics only")
        if user_id is not None and user_id != self.user_id:
            raise Forbidden(f"this credential belongs to user {self.user_id} and cannot act for another user")
        return self.user_id

    def needs_admin(self) -> None:
        """Raise Forbidden unless the scope is `admin`."""
        if self.scope != "admin":
            raise Forbidden("this needs a credential of scope admin")

    def needs_metrics(self) -> None:
        """Raise Forbidden unless the scope is `admin` or `metrics`."""
        if self.scope not in ("admin", "metrics"):
            raise Forbidden("this needs a credential of scope metrics or admin")


class Authenticator:
    """Authenticates requests. `secret` None: authentication is off. `clock` returns Unix seconds."""

    def __init__(self, database: Database, secret: str | None, clock: Callable[[], float]) -> None:
        self._database = database
        self._key = OctKey.import_key(secret) if secret is not None else None
        self._clock = clock
        self._confirmed: dict[str, tuple[float, bearers.BearerRow]] = {}
        self._failing_since: float | None = None

    async def __call__(self, request: Request, *, for_metrics: bool = False) -> Caller:
        """Return the caller. Raises Unauthenticated, and Unavailable if the store is needed and does not respond.

        `for_metrics`: accept a bearer that the store confirmed before it failed.
        """
        if self._key is None:
            return Caller("admin")
        credential = presented(request.headers.get("authorization"))
        if credential is None:
            raise Unauthenticated("send Authorization: Bearer TOKEN, with a bearer of this platform or a JWT")
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
                raise Unavailable("the store does not respond, so this bearer cannot be verified") from None
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
            raise Unauthenticated("the bearer is unknown or was revoked")
        if row.expires_at is not None and row.expires_at <= self._clock():
            raise Unauthenticated("the bearer has expired")
        return _caller(row.scope, row.user_id)

    def _by_jwt(self, credential: str, key: OctKey) -> Caller:
        try:
            claims = jwt.decode(credential, key, algorithms=[_ALGORITHM]).claims
        except (JoseError, ValueError, RecursionError):  # RecursionError: claims that are nested too deeply
            raise Unauthenticated("the JWT is malformed or not signed with JWT_SECRET (HS256)") from None
        now = self._clock()
        expires, not_before = claims.get("exp"), claims.get("nbf", 0)
        if not _is_time(expires) or not _is_time(not_before):
            raise Unauthenticated("the JWT needs exp, in Unix seconds, before the year 10000")
        if expires <= now or not_before > now:
            raise Unauthenticated("the JWT has expired or is not valid yet")
        return _caller(claims.get("scope", "user"), claims.get("sub"))


async def caller_of(request: Request) -> Caller:
    """Return the request's caller. Raises Unauthenticated."""
    if (known := getattr(request.state, "caller", None)) is not None:
        return cast(Caller, known)  # a request with a body is authenticated before its body is read (`bodies.py`)
    authenticator: Authenticator = request.app.state.authenticator
    return await authenticator(request)


async def metrics_reader(request: Request) -> Caller:
    """Return the caller of a metrics page, also while the store is unavailable. Raises Unauthenticated, Unavailable."""
    authenticator: Authenticator = request.app.state.authenticator
    return await authenticator(request, for_metrics=True)


MetricsReader = Annotated[Caller, Depends(metrics_reader)]
"""Parameter of `/metrics`: the caller, also while the store is unavailable."""
RequestCaller = Annotated[Caller, Depends(caller_of)]
"""Parameter of routes: the caller."""


def _caller(scope: object, user_id: object) -> Caller:
    if scope == "user":
        if not isinstance(user_id, str) or re.fullmatch(USER_ID_PATTERN, user_id) is None:
            value = repr(user_id[:80]) if isinstance(user_id, str) else "missing"
            raise Unauthenticated(
                f"a credential of scope user must name its user in `sub`: {USER_ID_RULE}; this one is {value}"
            )
        return Caller("user", user_id)
    if scope == "admin":
        return Caller("admin")
    if scope == "metrics":
        return Caller("metrics")
    raise Unauthenticated(f"the credential's scope must be one of {', '.join(get_args(ScopeName))}")


def _is_time(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LAST_SECOND
