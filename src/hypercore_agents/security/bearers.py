"""Generates random bearers, reads them from headers and compares them in constant time."""

import hashlib
import hmac
import secrets


def new_bearer() -> str:
    """Return 256 random bits, URL-safe, 43 characters."""
    return secrets.token_urlsafe(32)


def digest(bearer: str) -> str:
    """Return the SHA-256 of a bearer in hex, which is stored instead of it. Bearers are random and need no salt."""
    return hashlib.sha256(bearer.encode()).hexdigest()


def presented(header: str | None) -> str | None:
    """Return the credential of an `Authorization: Bearer …` header (RFC 6750 §2.1), None for any other header."""
    if header is None:
        return None
    scheme, _, credential = header.partition(" ")
    return credential.strip() or None if scheme.lower() == "bearer" else None


def matches(given: str | None, expected: str) -> bool:
    """Return whether two bearers are equal, in a time that does not depend on where they differ."""
    return given is not None and hmac.compare_digest(given.encode(), expected.encode())
