"""Errors in the format of the Claude API.

They imitate the wire format of another product, so they are deliberately not part of the platform's error tree
(`api/errors.py`): only the simulator raises and handles them.
Format and types: https://docs.claude.com/en/api/errors.
"""

import json

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""The API's error type for each documented status, and for 405."""


class ApiFailure(Exception):
    """An error answer. `retry_after` is in seconds and is sent as the `retry-after` header."""

    def __init__(self, status: int, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


def failure_body(failure: ApiFailure, request_id: str) -> bytes:
    """Return the JSON body of an error; it is also the data of a stream's `error` event."""
    error = {"type": ERROR_TYPES[failure.status], "message": failure.message}
    return json.dumps({"type": "error", "error": error, "request_id": request_id}).encode()


def invalid(field: str, problem: str) -> ApiFailure:
    """Return the 400 that names a field as the API does: `messages.0.role: ...`."""
    return ApiFailure(400, f"{field}: {problem}")
