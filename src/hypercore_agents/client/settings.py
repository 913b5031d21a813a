"""Where the platform is and as whom to speak: arguments, then HYPERCORE_AGENTS_URL and HYPERCORE_AGENTS_TOKEN."""

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from hypercore_agents.client.errors import ClientError

DEFAULT_URL = "http://127.0.0.1:8080"


@dataclass(frozen=True)
class Door:
    """A base URL in parts, and the bearer to show there."""

    secure: bool
    host: str
    port: int
    prefix: str
    token: str | None

    @property
    def url(self) -> str:
        """The base URL, without a slash at its end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.prefix}"


def door(url: str | None, token: str | None) -> Door:
    """Return where to call. Raises ClientError for an address that is none."""
    text = url or os.environ.get("HYPERCORE_AGENTS_URL") or DEFAULT_URL
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    plain = text.isascii() and text.isprintable() and " " not in text
    if not plain or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClientError(f"{text!r} is no address of a manager; give one like {DEFAULT_URL}")
    credential = token or os.environ.get("HYPERCORE_AGENTS_TOKEN") or None
    if credential is not None and not (credential.isascii() and credential.isprintable() and " " not in credential):
        raise ClientError("the token (HYPERCORE_AGENTS_TOKEN) has characters that no token has; copy it again")
    secure = parts.scheme == "https"
    return Door(
        secure=secure,
        host=parts.hostname,
        port=port or (443 if secure else 80),
        prefix=parts.path.rstrip("/"),
        token=credential,
    )
