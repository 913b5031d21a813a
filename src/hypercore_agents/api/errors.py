"""The tree of domain errors, and the shape in which every server returns them.

    HypercoreError
    ├── InvalidRequest         400  invalid_request       a field is wrong; `details.field` names it
    ├── Unauthenticated        401  unauthenticated       no credential, or an invalid one
    ├── Forbidden              403  forbidden             a valid credential without permission
    ├── BudgetExceeded         403  budget_exceeded       the session's or the user's budget is spent
    ├── NotFound               404  not_found             does not exist or belongs to another user (same response)
    ├── MethodNotAllowed       405  method_not_allowed    the route exists with other methods
    ├── RequestTimeout         408  request_timeout       the request did not arrive in time
    ├── Conflict               409  conflict              the current state does not allow it
    ├── PayloadTooLarge        413  payload_too_large     over a stated limit in bytes
    ├── RateLimited            429  rate_limited          over a rate limit; `Retry-After` says when to retry
    ├── InternalError          500  internal              a defect; the log contains the request id
    ├── AgentUnreachable       502  agent_unreachable     the agent did not answer, or died during the turn
    ├── ModelFailed            502  model_error           the Claude API returned an error
    ├── AtCapacity             503  at_capacity           no free capacity; `Retry-After` says when to retry
    ├── Unavailable            503  unavailable           a required component is down or shutting down
    └── DeadlineExceeded       504  deadline_exceeded     the turn or the request took too long

Services raise these errors; only `hypercore_agents.http.errors` turns them into HTTP responses. The list of types is
closed, so clients may match on them.
"""

from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

ErrorType = Literal[
    "invalid_request",
    "unauthenticated",
    "forbidden",
    "budget_exceeded",
    "not_found",
    "method_not_allowed",
    "request_timeout",
    "conflict",
    "payload_too_large",
    "rate_limited",
    "internal",
    "agent_unreachable",
    "model_error",
    "at_capacity",
    "unavailable",
    "deadline_exceeded",
]
ERROR_TYPES: tuple[str, ...] = get_args(ErrorType)


class ErrorDetail(BaseModel):
    """An error, for programs (`type`, `retryable`, `details`) and for people (`message`)."""

    model_config = ConfigDict(extra="forbid")

    type: ErrorType
    message: str
    request_id: str
    retryable: bool = Field(
        description="whether the same request may be repeated: it had no effect and may succeed later"
    )
    details: dict[str, Any] | None = None


class ErrorBody(BaseModel):
    """The body of every error response, and the data of a stream's `error` event."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorDetail


class HypercoreError(Exception):
    """Base of all domain errors.

    `message` is sent to the client, so it never contains a secret; it names the field and the remedy.
    `details` is JSON-serialisable. `retry_after` is in seconds.
    """

    type: ClassVar[ErrorType] = "internal"
    status: ClassVar[int] = 500
    retryable: bool = False

    def __init__(
        self,
        message: str,
        *,
        details: dict[str, Any] | None = None,
        retry_after: float | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        self.retry_after = retry_after
        if retryable is not None:
            self.retryable = retryable

    def after_effects(self, session_id: str | None, turn: int) -> Self:
        """Mark this error as not retryable, because the turn may have run tools or sent text, and return it.

        `session_id` is the turn's session, None if the session ended with the turn.
        """
        if self.retryable:
            remedy = (
                f"check session {session_id} and continue with a new prompt" if session_id else "its session has ended"
            )
            cause = self.message.removesuffix("; try again")
            self.message = f"{cause}; the turn may have had effects, so do not repeat it: {remedy}"
        self.retryable, self.retry_after = False, None
        named = {"session_id": session_id} if session_id else {}
        self.details = {**(self.details or {}), "acted": True, **named, "turn": turn}
        return self

    def for_another_agent(self) -> Self:
        """Mark this error as raised by the agent before the turn began, so another agent may run it, and return it."""
        self.details = {**(self.details or {}), "acted": False, "other_agent": True}
        return self

    @property
    def is_for_another_agent(self) -> bool:
        """Whether the turn did not begin and another agent may run it."""
        details = self.details or {}
        return details.get("other_agent") is True and details.get("acted") is False

    def body(self, request_id: str) -> ErrorBody:
        """Return this error as a wire model."""
        return ErrorBody(
            error=ErrorDetail(
                type=self.type,
                message=self.message,
                request_id=request_id,
                retryable=self.retryable,
                details=self.details,
            )
        )


def readable_size(size: int) -> str:
    """Return a size in bytes as text for messages: in MB or KB if it is a whole number of them."""
    for unit, factor in (("MB", 1 << 20), ("KB", 1 << 10)):
        if size >= factor and size % factor == 0:
            return f"{size // factor} {unit}"
    return f"{size} bytes"


def parse_error(body: bytes, *, retry_after: float | None = None) -> HypercoreError | None:
    """Return the domain error in the response of another component, None if the body is not one."""
    try:
        detail = ErrorBody.model_validate_json(body).error
    except ValidationError:
        return None
    kind = next((kind for kind in HypercoreError.__subclasses__() if kind.type == detail.type), HypercoreError)
    error = kind(detail.message, details=detail.details)
    error.retryable, error.retry_after = detail.retryable, retry_after or error.retry_after
    return error


class InvalidRequest(HypercoreError):
    """A field, parameter, header or body is wrong. Set `field` if the error concerns one field."""

    type = "invalid_request"
    status = 400

    def __init__(self, message: str, *, field: str | None = None, details: dict[str, Any] | None = None):
        super().__init__(message, details={**(details or {}), **({"field": field} if field else {})} or None)


class Unauthenticated(HypercoreError):
    """The credential is missing, malformed, expired, revoked or unknown."""

    type = "unauthenticated"
    status = 401


class Forbidden(HypercoreError):
    """The credential is valid but does not permit this."""

    type = "forbidden"
    status = 403


class BudgetExceeded(HypercoreError):
    """A budget in USD is spent; retrying fails until the budget is raised."""

    type = "budget_exceeded"
    status = 403


class NotFound(HypercoreError):
    """The resource does not exist or belongs to another user; the response is the same."""

    type = "not_found"
    status = 404


class MethodNotAllowed(HypercoreError):
    """The path exists with other methods."""

    type = "method_not_allowed"
    status = 405


class RequestTimeout(HypercoreError):
    """The rest of the request did not arrive in time."""

    type = "request_timeout"
    status = 408
    retryable = True


class Conflict(HypercoreError):
    """The current state does not allow this: frozen options, a running turn, an old generation."""

    type = "conflict"
    status = 409


class PayloadTooLarge(HypercoreError):
    """A body or field is larger than its limit."""

    type = "payload_too_large"
    status = 413


class RateLimited(HypercoreError):
    """Too many requests, by a limit of the platform or of the Claude API; retry after `retry_after` seconds."""

    type = "rate_limited"
    status = 429
    retryable = True


class InternalError(HypercoreError):
    """A defect of the platform. The message reveals nothing but how to use the request id."""

    type = "internal"
    status = 500
    retryable = True


class AgentUnreachable(HypercoreError):
    """The agent refused the connection, died, or violated the protocol."""

    type = "agent_unreachable"
    status = 502
    retryable = True


class ModelFailed(HypercoreError):
    """The Claude API returned an error; `details.api_status` is its status."""

    type = "model_error"
    status = 502


class AtCapacity(HypercoreError):
    """No free capacity: sessions, processes, or resources of the host."""

    type = "at_capacity"
    status = 503
    retryable = True

    def __init__(self, message: str, *, retry_after: float = 5, details: dict[str, Any] | None = None):
        super().__init__(message, details=details, retry_after=retry_after)


class Unavailable(HypercoreError):
    """A component that the request needs is down, starting or draining."""

    type = "unavailable"
    status = 503
    retryable = True

    def __init__(self, message: str, *, retry_after: float = 5, details: dict[str, Any] | None = None):
        super().__init__(message, details=details, retry_after=retry_after)


class DeadlineExceeded(HypercoreError):
    """The turn or the request took longer than allowed."""

    type = "deadline_exceeded"
    status = 504
    retryable = True
