"""The one tree of domain errors, and the shape in which every door shows them.

    HypercoreError
    ├── InvalidRequest         400  invalid_request       a field is wrong; `details.field` names it
    ├── Unauthenticated        401  unauthenticated       no credential, or one that is not ours
    ├── Forbidden              403  forbidden             a valid credential that may not do this
    ├── BudgetExceeded         403  budget_exceeded       the session's or the user's money is spent
    ├── NotFound               404  not_found             no such thing, or not yours (never told apart)
    ├── MethodNotAllowed       405  method_not_allowed    the route exists, the method does not
    ├── RequestTimeout         408  request_timeout       the request itself did not arrive in time
    ├── Conflict               409  conflict              the state forbids it now
    ├── PayloadTooLarge        413  payload_too_large     over a stated limit in bytes
    ├── RateLimited            429  rate_limited          over a rate; `Retry-After` says when
    ├── InternalError          500  internal              our fault; the log has the request id
    ├── AgentUnreachable       502  agent_unreachable     the agent did not answer or died in mid-turn
    ├── ModelFailed            502  model_error           the Claude API answered with an error
    ├── AtCapacity             503  at_capacity           no room; `Retry-After` says when to ask again
    ├── Unavailable            503  unavailable           a part that this needs is down or shutting down
    └── DeadlineExceeded       504  deadline_exceeded     the turn's or the request's time is up

Services raise these; `hypercore_agents.http.errors` turns them into HTTP and nothing else does.
The list of types is closed: a client may match on it.
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
    """What went wrong, for a program (`type`, `retryable`, `details`) and for a person (`message`)."""

    model_config = ConfigDict(extra="forbid")

    type: ErrorType
    message: str
    request_id: str
    retryable: bool = Field(
        description="whether the same request may be sent again: it had no effect and may succeed later"
    )
    details: dict[str, Any] | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is an error, and the data of a stream's `error` event."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorDetail


class HypercoreError(Exception):
    """Base of all domain errors.

    `message` is shown to the client, so it never holds a secret; it names the field and the remedy.
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
        """Return this error as that of a turn that may have run tools or said text, so that it is not sent again.

        `session_id`: the turn's session; None where it ended with the turn.
        """
        if self.retryable:
            left = f"look at session {session_id} and go on with a new prompt" if session_id else "its session is over"
            self.message = (
                f"{self.message.removesuffix('; try again')}; the turn may have acted, so do not repeat it: {left}"
            )
        self.retryable, self.retry_after = False, None
        named = {"session_id": session_id} if session_id else {}
        self.details = {**(self.details or {}), "acted": True, **named, "turn": turn}
        return self

    def for_another_agent(self) -> Self:
        """Return this error marked as the agent's fault: nothing of the turn began, and another agent may run it."""
        self.details = {**(self.details or {}), "acted": False, "other_agent": True}
        return self

    @property
    def is_for_another_agent(self) -> bool:
        """Whether nothing of the turn began, and another agent may run it."""
        details = self.details or {}
        return details.get("other_agent") is True and details.get("acted") is False

    def body(self, request_id: str) -> ErrorBody:
        """Return the wire form of this error."""
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
    """Return a number of bytes for a message: in MB or KB where it is a whole number of them."""
    for unit, factor in (("MB", 1 << 20), ("KB", 1 << 10)):
        if size >= factor and size % factor == 0:
            return f"{size // factor} {unit}"
    return f"{size} bytes"


def parse_error(body: bytes, *, retry_after: float | None = None) -> HypercoreError | None:
    """Return the domain error that another part of the platform answered with; None: the body is none."""
    try:
        said = ErrorBody.model_validate_json(body).error
    except ValidationError:
        return None
    kind = next((kind for kind in HypercoreError.__subclasses__() if kind.type == said.type), HypercoreError)
    error = kind(said.message, details=said.details)
    error.retryable, error.retry_after = said.retryable, retry_after or error.retry_after
    return error


class InvalidRequest(HypercoreError):
    """A field, parameter, header or body is wrong. Give `field` whenever one field is to blame."""

    type = "invalid_request"
    status = 400

    def __init__(self, message: str, *, field: str | None = None, details: dict[str, Any] | None = None):
        super().__init__(message, details={**(details or {}), **({"field": field} if field else {})} or None)


class Unauthenticated(HypercoreError):
    """No credential was given, or it is malformed, expired, revoked or not ours."""

    type = "unauthenticated"
    status = 401


class Forbidden(HypercoreError):
    """The credential is valid and does not reach this far."""

    type = "forbidden"
    status = 403


class BudgetExceeded(HypercoreError):
    """A budget in USD is spent; asking again cannot help until somebody raises it."""

    type = "budget_exceeded"
    status = 403


class NotFound(HypercoreError):
    """There is no such thing, or it belongs to somebody else: the answer is the same."""

    type = "not_found"
    status = 404


class MethodNotAllowed(HypercoreError):
    """The path exists with other methods."""

    type = "method_not_allowed"
    status = 405


class RequestTimeout(HypercoreError):
    """The rest of a request did not come, though the connection stayed open."""

    type = "request_timeout"
    status = 408
    retryable = True


class Conflict(HypercoreError):
    """The thing's present state forbids this: frozen options, a running turn, a stale generation."""

    type = "conflict"
    status = 409


class PayloadTooLarge(HypercoreError):
    """A body or field is larger than its limit."""

    type = "payload_too_large"
    status = 413


class RateLimited(HypercoreError):
    """Too many requests, ours or the Claude API's count; `retry_after` says when to come back."""

    type = "rate_limited"
    status = 429
    retryable = True


class InternalError(HypercoreError):
    """A defect of ours. The message tells the client nothing but the request id's use."""

    type = "internal"
    status = 500
    retryable = True


class AgentUnreachable(HypercoreError):
    """The agent refused the connection, died, or broke the protocol."""

    type = "agent_unreachable"
    status = 502
    retryable = True


class ModelFailed(HypercoreError):
    """The Claude API answered with an error; `details.api_status` holds its status."""

    type = "model_error"
    status = 502


class AtCapacity(HypercoreError):
    """No room at present: places, processes, quota of the host."""

    type = "at_capacity"
    status = 503
    retryable = True

    def __init__(self, message: str, *, retry_after: float = 5, details: dict[str, Any] | None = None):
        super().__init__(message, details=details, retry_after=retry_after)


class Unavailable(HypercoreError):
    """A part that the request needs is down, starting or draining."""

    type = "unavailable"
    status = 503
    retryable = True

    def __init__(self, message: str, *, retry_after: float = 5, details: dict[str, Any] | None = None):
        super().__init__(message, details=details, retry_after=retry_after)


class DeadlineExceeded(HypercoreError):
    """The time allowed is over."""

    type = "deadline_exceeded"
    status = 504
    retryable = True
