"""The head of a request to an upstream: its URL split into origin and target, and its bytes. Pure."""

import functools
import re
from typing import Literal

from hypercore_agents.kit.relay.connection import RawHeaders
from hypercore_agents.kit.relay.connection_pool import Origin

_AUTHORITY = re.compile(r"((?:\[[0-9A-Fa-f:.]+\])|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_TARGET = re.compile(r"[!-~]+")
_NOT_A_URL = "not an absolute http or https URL in ASCII"


@functools.lru_cache(4096)
def split_url(url: str) -> tuple[Origin, str, str]:
    """Return origin, request target and Host of an absolute URL. Raises ValueError: a programming error."""
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    origin, host = _origin(scheme, authority)
    target = (slash + path).partition("#")[0] or "/"
    if _TARGET.fullmatch(target) is None:
        raise ValueError(_NOT_A_URL)
    return origin, target, host


def _origin(scheme: str, authority: str) -> tuple[Origin, str]:
    found = _AUTHORITY.fullmatch(authority)
    if found is None or scheme not in ("http", "https"):
        raise ValueError(_NOT_A_URL)
    host, port = found.groups()
    secure = scheme == "https"
    number = int(port) if port else 443 if secure else 80
    host_header = host if number == (443 if secure else 80) else f"{host}:{number}"
    return Origin(secure, host.strip("[]"), number), host_header


def request_head(
    method: str,
    target: str,
    host: str,
    headers: RawHeaders,
    length: int | Literal["chunked"] | None,
) -> bytes:
    """Return the bytes of a request's head. `length` is that of its body; None: it has none.

    Raises ValueError if a part contains a line break or a null character.
    """
    lines = [f"{method} {target} HTTP/1.1\r\nHost: {host}".encode()]
    lines += [b": ".join(pair) for pair in headers]
    if length == "chunked":
        lines.append(b"Transfer-Encoding: chunked")
    elif length is not None:
        lines.append(b"Content-Length: %d" % length)
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
        raise ValueError("the request head contains a line break or a null character")
    return head + b"\r\n\r\n"
