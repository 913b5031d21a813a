"""Errors of the client.

ClientError
├── ServerError   the server answered with an error: `type`, `status`, `request_id`, `retryable`, `details`
├── Unreachable   no answer: refused, timed out, cut off; `sent`: the server may have received the request
└── StreamLost    a stream was cut off and could not be resumed; the session remains usable
"""

import json
from collections.abc import Mapping
from typing import Any


class ClientError(Exception):
    """Base class of all errors of the client."""


class ServerError(ClientError):
    """An error answer of the server. `status` is None for an error inside a stream; `retry_after` is in seconds."""

    def __init__(
        self,
        message: str,
        *,
        type: str,
        request_id: str = "",
        status: int | None = None,
        retryable: bool = False,
        retry_after: float | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.type = type
        self.request_id = request_id
        self.status = status
        self.retryable = retryable
        self.retry_after = retry_after
        self.details = details or {}

    def __str__(self) -> str:
        return f"{self.message} ({self.type}{f', request {self.request_id}' if self.request_id else ''})"


class Unreachable(ClientError):
    """No complete answer arrived. `sent`: whether the server may have received the request."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class StreamLost(ClientError):
    """A stream, or only its text, cannot continue. `session_id` and `last_event_id` give its position."""

    def __init__(self, message: str, *, session_id: str | None, last_event_id: str | None) -> None:
        super().__init__(message)
        self.session_id = session_id
        self.last_event_id = last_event_id


def error_of(status: int, headers: Mapping[str, str], body: bytes) -> ServerError:
    """Return the error for an answer, including answers of other programs such as a proxy."""
    retry_after = _seconds(next((value for name, value in headers.items() if name.lower() == "retry-after"), None))
    try:
        return error_in(json.loads(body), status=status, retry_after=retry_after)
    except (ValueError, KeyError, TypeError):
        text = body[:200].decode(errors="replace").strip()
        return ServerError(
            f"the answer was {status}, not from this platform: {text or '(empty)'}",
            type="internal",
            status=status,
            retryable=status in (429, 502, 503, 504),
            retry_after=retry_after,
        )


def error_in(body: Any, *, status: int | None = None, retry_after: float | None = None) -> ServerError:
    """Return the error for a parsed body. Raises KeyError or TypeError if the body has another shape."""
    error = body["error"]
    return ServerError(
        str(error["message"]),
        type=str(error["type"]),
        request_id=str(error.get("request_id", "")),
        status=status,
        retryable=bool(error["retryable"]),
        retry_after=retry_after,
        details=error.get("details"),
    )


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.strip().isdigit() else None
