"""The front door: checks of every request before it reaches a route. Bare ASGI, because it is on the streaming path.

- `Host`: exactly one; HTTP/1.0 needs none on /health and /ready. `AGENT_ID.<BASE_DOMAIN>` becomes the path
  `/agents/AGENT_ID/...`. With authentication off, only names of this machine and of BASE_DOMAIN are served, which
  defeats DNS rebinding: a page whose own name resolves to 127.0.0.1 is rejected.
- Headers on which a decision depends (`_ONCE`) must not be repeated: a proxy in front of the manager may have used the
  other value.
- `Origin`: absent, or this host. A page of another site must not act for the user of this machine's browser.
- A body must be declared as JSON, except for an uploaded file. Bodies that a form or a "simple" cross-origin request
  can send are rejected.
- Paths that two parsers could read differently are rejected: encoded slashes, dot segments, doubled slashes, and
  backslashes outside of a file's path.
"""

import re

from hypercore_agents.api.errors import Forbidden, InvalidRequest, NotFound
from hypercore_agents.api.ids import AGENT_ID_PATTERN
from hypercore_agents.http.context import App, Receive, Scope, Send, header
from hypercore_agents.http.serve import is_loopback

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")
_AGENT_ID = re.compile(AGENT_ID_PATTERN)
_AMBIGUOUS = re.compile(rb"//|%2[fF]|%00|(?:^|/)(?:\.|%2[eE]){1,2}(?:/|$)")
_BACKSLASH = re.compile(rb"%5[cC]|\\")
_FILE = re.compile(r"(/agents/[^/]+)?/v1/agent/session/[^/]+/files/(?s:.+)")
_ONCE = {
    name.lower().encode(): name
    for name in ("Host", "Origin", "Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID")
}
_PROBED = frozenset({"/health", "/ready"})
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


class FrontDoor:
    """Checks requests and rewrites agents' host names to paths. `authenticated`: whether authentication is on."""

    def __init__(self, app: App, *, base_domain: str | None, authenticated: bool) -> None:
        self._app = app
        self._base_domain = base_domain
        self._authenticated = authenticated

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope. Raises domain errors for the middleware around it."""
        if scope["type"] == "http":
            _refuse_repeated_headers(scope)
            host = self._host(scope)
            self._refuse_other_origins(scope, host)
            _refuse_ambiguous_path(scope)
            _refuse_undeclared_body(scope)
            self._to_agent_path(scope, host)
        await self._app(scope, receive, send)

    def _host(self, scope: Scope) -> str:
        values = [value for name, value in scope["headers"] if name == b"host"]
        if not values and _is_old_probe(scope):
            return ""
        if len(values) != 1:
            raise InvalidRequest("the request needs exactly one Host header", field="Host")
        match = _HOST.fullmatch(values[0].decode("latin-1"))
        if match is None:
            raise InvalidRequest("Host must be a name or an address, with or without a port", field="Host")
        host = match[1].lower().rstrip(".")
        if not self._authenticated and not is_loopback(host.strip("[]")) and not self._is_of_domain(host):
            raise Forbidden(
                "authentication is off, so only 127.0.0.1, localhost and hosts of BASE_DOMAIN are served; use one of "
                "them, or set ENABLE_AUTH=true and JWT_SECRET"
            )
        return host

    def _is_of_domain(self, host: str) -> bool:
        domain = self._base_domain
        return domain is not None and (host == domain or host.endswith(f".{domain}"))

    def _refuse_other_origins(self, scope: Scope, host: str) -> None:
        origin = header(scope, "origin")
        if origin is None:
            return
        _, separator, authority = origin.partition("://")
        if not separator or authority.lower() != (header(scope, "host") or host).lower():
            raise Forbidden("cross-origin requests are refused; send requests from browsers to their own host")

    def _to_agent_path(self, scope: Scope, host: str) -> None:
        domain = self._base_domain
        if domain is None or not host.endswith(f".{domain}"):
            return
        label = host.removesuffix(f".{domain}")
        if _AGENT_ID.fullmatch(label) is None:
            raise NotFound(f"there is no host {host[:100]}; agents are AGENT_ID.{domain}")
        prefix = f"/agents/{label}"
        scope["path"] = prefix + scope["path"]
        scope["raw_path"] = prefix.encode() + scope.get("raw_path", scope["path"].encode())


def _refuse_repeated_headers(scope: Scope) -> None:
    given = [name for name, _ in scope["headers"] if name in _ONCE]
    if len(given) != len(set(given)):
        name = _ONCE[next(name for name in given if given.count(name) > 1)]
        raise InvalidRequest(f"the request has more than one {name} header", field=name)


def _is_old_probe(scope: Scope) -> bool:
    """Return whether this is a load balancer's probe in HTTP/1.0, which has no Host. Browsers do not send these."""
    return scope["http_version"] == "1.0" and scope["method"] in ("GET", "HEAD") and scope["path"] in _PROBED


def _refuse_ambiguous_path(scope: Scope) -> None:
    raw = scope.get("raw_path") or scope["path"].encode()
    ambiguous = _AMBIGUOUS.search(raw) is not None
    # A file's name may contain a backslash. Elsewhere it is ambiguous, because some servers treat it as a slash.
    if _BACKSLASH.search(raw) is not None and not _FILE.fullmatch(scope["path"]):
        ambiguous = True
    if not raw.startswith(b"/") or ambiguous:
        raise InvalidRequest(
            "the path has doubled, encoded or dotted segments; send it in its plain form", field="path"
        )


def _refuse_undeclared_body(scope: Scope) -> None:
    if scope["method"] not in _WITH_BODY:
        return
    length = header(scope, "content-length")
    if length in (None, "0") and header(scope, "transfer-encoding") is None:
        return
    if scope["method"] == "PUT" and _FILE.fullmatch(scope["path"]):
        return  # a cross-origin PUT needs a preflight request, which the manager does not grant
    media = (header(scope, "content-type") or "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise InvalidRequest("the body must be JSON, with Content-Type: application/json", field="Content-Type")
