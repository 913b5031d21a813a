"""Address and token of the platform: arguments, then HYPERCORE_AGENTS_URL and HYPERCORE_AGENTS_TOKEN."""

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from hypercore_agents.client.errors import ClientError

DEFAULT_URL = "http://127.0.0.1:8080"


@dataclass(frozen=True)
class Endpoint:
    """The parts of a base URL, and the bearer token."""

    secure: bool
    host: str
    port: int
    prefix: str
    token: str | None

    @property
    def url(self) -> str:
        """The base URL without a trailing slash."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.prefix}"


def endpoint(url: str | None, token: str | None) -> Endpoint:
    """Return the endpoint. Raises ClientError for an invalid URL or token."""
    text = url or os.environ.get("HYPERCORE_AGENTS_URL") or DEFAULT_URL
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    plain = text.isascii() and text.isprintable() and " " not in text
    if not plain or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClientError(f"{text!r} is not the URL of a manager; use one like {DEFAULT_URL}")
    credential = token or os.environ.get("HYPERCORE_AGENTS_TOKEN") or None
    if credential is not None and not (credential.isascii() and credential.isprintable() and " " not in credential):
        raise ClientError("the token (HYPERCORE_AGENTS_TOKEN) contains invalid characters; copy it again")
    secure = parts.scheme == "https"
    return Endpoint(
        secure=secure,
        host=parts.hostname,
        port=port or (443 if secure else 80),
        prefix=parts.path.rstrip("/"),
        token=credential,
    )
