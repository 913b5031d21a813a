"""Translates the SDK's result of a turn into a status or a domain error. Pure functions.

API errors do not raise in the SDK. They arrive as a result of subtype "success" with `is_error` and, mostly, the API's
status. A refusal arrives as an error too, and becomes a status here. The CLI's error texts contain the gateway's
address, so only texts of 4xx errors are passed on, with addresses removed.
"""

import re
from typing import Literal

from claude_agent_sdk import ResultMessage

from hypercore_agents.agent.claude.translate import Translator
from hypercore_agents.api.chat import TurnStatus
from hypercore_agents.api.errors import (
    AgentUnreachable,
    BudgetExceeded,
    Conflict,
    DeadlineExceeded,
    HypercoreError,
    InvalidRequest,
    ModelFailed,
    RateLimited,
    Unavailable,
)
from hypercore_agents.observability.logging import mask_secrets

StopReason = Literal["user", "disconnect", "deadline", "draining", "deleted"]
"""Why a turn was stopped: by its user, because its client disconnected, at its timeout, by a drain, or because its
session was deleted."""

_ADDRESS = re.compile(r"(https?://\S+)|\(?\b(\d{1,3}\.){3}\d{1,3}(:\d+)?\)?")
_PREFIX = re.compile(r"^(Failed to authenticate\. )?API Error: (Request rejected )?\(?(\d{3})?\)?[\s·:]*")
"""Text of the CLI before the API's message."""
_BUDGET = re.compile(r"budget", re.IGNORECASE)
_TOKENS = re.compile(r"max_tokens", re.IGNORECASE)
_LONGEST_CAUSE = 500
_TOO_LONG = frozenset({"blocking_limit", "prompt_too_long", "rapid_refill_breaker"})
"""Reasons of the CLI to send no further model request: the conversation exceeds the model's context window."""
_NO_ANSWER = re.compile(
    r"the Claude API (?:could not be reached|closed the connection|did not answer|sent an invalid HTTP response)[^.;(]*"
)
"""The gateway's own error messages about an API that did not answer."""
LOST_CONNECTION = "connection"
"""`details.cause` of an error from a lost connection, on either side."""


def stopped(reason: StopReason, timeout: float) -> TurnStatus:
    """Return the status of a turn that was stopped, or raise the domain error that it ends with."""
    if reason == "deadline":
        raise DeadlineExceeded(
            f"the turn was interrupted at its timeout of {timeout:g} s; the session remains usable",
            details={"timeout_seconds": timeout},
        )
    if reason == "draining":
        raise Unavailable("the agent is shutting down and interrupted the turn; try again", retry_after=5)
    if reason == "deleted":
        raise Conflict("the session was deleted during its turn")
    return "interrupted"


def conclude(translator: Translator, result: ResultMessage) -> TurnStatus:
    """Return the status of a turn that ended by itself, or raise its domain error."""
    if result.subtype == "error_max_turns":
        return "max_turns"
    if result.subtype == "error_max_budget_usd":
        return "budget_exceeded"
    if result.subtype == "error_max_structured_output_retries":
        raise ModelFailed("the model's answer does not match output_schema", details={"field": "output_schema"})
    if result.stop_reason == "refusal":
        return "refused"
    if not result.is_error and result.subtype == "success":
        return "max_tokens" if result.stop_reason == "max_tokens" else "completed"
    if result.terminal_reason in ("aborted_streaming", "aborted_tools"):
        return "interrupted"
    status = result.api_error_status
    cause = result.result or ""
    if result.terminal_reason in _TOO_LONG or status == 413:
        raise InvalidRequest(
            "prompt: the prompt and the session's history exceed the model's context window; shorten the prompt or "
            f"start a new session ({_public(cause)[:200]})",
            field="prompt",
            details={"api_status": status, "cause": "prompt_too_long"},
        )
    if status == 403 and _TOKENS.search(cause) and translator.content:
        # The gateway refused to continue an answer that had used all of the turn's max_tokens.
        return "max_tokens"
    if status is None and result.terminal_reason not in (None, "api_error"):
        raise ModelFailed(
            f"the Claude CLI ended the turn ({result.terminal_reason}): {_public(cause)}",
            details={"api_status": None, "cause": result.terminal_reason},
        )
    raise failure(status, cause, retry_after=translator.retry_after, subtype=result.subtype)


def check_output(translator: Translator, result: ResultMessage | None) -> None:
    """Raise ModelFailed if a turn with `output_schema` completed without a structured answer."""
    if result is None or result.structured_output is None:
        raise ModelFailed(
            "the model answered in text instead of output_schema, also on a second request",
            details={"field": "output_schema", "content": translator.content[:_LONGEST_CAUSE]},
        )


def failure(status: int | None, cause: str, *, retry_after: float | None = None, subtype: str = "") -> HypercoreError:
    """Return the domain error for a model request that failed with `status` (None: no answer)."""
    text = _public(cause)
    details = {"api_status": status}
    if status == 429:
        return RateLimited(
            "the Claude API's rate limit is reached", details=details, retry_after=max(1.0, retry_after or 1.0)
        )
    if status in (402, 403) and (_BUDGET.search(cause) or _TOKENS.search(cause)):
        return BudgetExceeded(text or "the budget is spent", details=details)
    if status == 401:
        return ModelFailed(
            "the Claude API rejected the API key (401); set a valid key for this agent, this user or the platform",
            details={**details, "cause": "api_key"},
        )
    if status is not None and 400 <= status < 500:
        return ModelFailed(f"the Claude API answered {status}: {text}", details=details, retryable=status == 408)
    if status is not None and (silent := _NO_ANSWER.search(cause)):
        return ModelFailed(
            f"{silent[0].strip()} (the connection from the gateway to the API); try again",
            details={"api_status": None, "cause": LOST_CONNECTION},
            retryable=True,
        )
    if status is not None:
        return ModelFailed(f"the Claude API answered {status}; try again", details=details, retryable=True)
    if subtype not in ("", "success"):
        return AgentUnreachable("the Claude CLI ended the turn; the session continues with its next turn")
    if "ECONNREFUSED" in cause:
        return no_gateway()
    return ModelFailed(
        "the model's answer was cut off: the Claude API or the gateway closed the connection; try again",
        details={**details, "cause": LOST_CONNECTION},
        retryable=True,
    )


def no_gateway() -> Unavailable:
    """Return the error for a turn whose model requests could not reach the gateway."""
    return Unavailable("the platform's model gateway does not answer; try again", retry_after=5)


def _public(cause: str) -> str:
    return _ADDRESS.sub("", _PREFIX.sub("", mask_secrets(cause))).strip()[:_LONGEST_CAUSE]
