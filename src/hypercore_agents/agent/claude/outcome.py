"""How a turn ended: from the SDK's result to a status or a domain error. Pure.

API errors do not raise in the SDK: they come as a result of subtype "success" with `is_error` and, mostly, the API's
status. A refusal comes as an error too and is none here. The texts that the CLI makes of errors name the gateway's
address, so only those that come from a 4xx are told, and without addresses.
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

StopReason = Literal["asked", "gone", "deadline", "draining", "deleted"]
"""Why a turn was stopped: its user asked, its client went away, time was up, the agent drains, the session ended."""

_ADDRESS = re.compile(r"(https?://\S+)|\(?\b(\d{1,3}\.){3}\d{1,3}(:\d+)?\)?")
_PREFIX = re.compile(r"^(Failed to authenticate\. )?API Error: (Request rejected )?\(?(\d{3})?\)?[\s·:]*")
"""What the CLI writes before the API's own words."""
_BUDGET = re.compile(r"budget", re.IGNORECASE)
_TOKENS = re.compile(r"max_tokens", re.IGNORECASE)
_LONGEST_CAUSE = 500
_TOO_LONG = frozenset({"blocking_limit", "prompt_too_long", "rapid_refill_breaker"})
"""Reasons of the CLI for not asking the model, or not again: the conversation is longer than the model takes."""
_NO_ANSWER = re.compile(
    r"the Claude API (?:could not be reached|closed the connection|did not answer|answered with broken HTTP)[^.;(]*"
)
"""What the gateway says, with a status of its own, of an API that did not answer."""
LOST_CONNECTION = "connection"
"""`details.cause` of an error that is a lost connection, by whichever side."""


def stopped(reason: StopReason, timeout: float) -> TurnStatus:
    """Return the status of a turn that was stopped, or raise the domain error that it ends with."""
    if reason == "deadline":
        raise DeadlineExceeded(
            f"the turn did not end within its timeout of {timeout:g} s and was interrupted; the session stays usable",
            details={"timeout_seconds": timeout},
        )
    if reason == "draining":
        raise Unavailable("the agent shuts down and interrupted the turn; try again", retry_after=5)
    if reason == "deleted":
        raise Conflict("the session was deleted while its turn ran")
    return "interrupted"


def conclude(turn: Translator, result: ResultMessage) -> TurnStatus:
    """Return the status of a turn that ended by itself, or raise the domain error that it ended with."""
    if result.subtype == "error_max_turns":
        return "max_turns"
    if result.subtype == "error_max_budget_usd":
        return "budget_exceeded"
    if result.subtype == "error_max_structured_output_retries":
        raise ModelFailed("the model gave no answer that fits output_schema", details={"field": "output_schema"})
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
            f"prompt: with the session's history it is longer than the model takes; shorten it, or start a new session "
            f"({_told(cause)[:200]})",
            field="prompt",
            details={"api_status": status, "cause": "prompt_too_long"},
        )
    if status == 403 and _TOKENS.search(cause) and turn.content:
        # the gateway refused to continue an answer that had used up what the turn may produce
        return "max_tokens"
    if status is None and result.terminal_reason not in (None, "api_error"):
        raise ModelFailed(
            f"the Claude CLI gave the turn up ({result.terminal_reason}): {_told(cause)}",
            details={"api_status": None, "cause": result.terminal_reason},
        )
    raise failure(status, cause, retry_after=turn.retry_after, subtype=result.subtype)


def check_output(turn: Translator, result: ResultMessage | None) -> None:
    """Raise ModelFailed when a turn that was to answer by `output_schema` completed without such an answer."""
    if result is None or result.structured_output is None:
        raise ModelFailed(
            "the model answered in text and not as output_schema says, also when it was asked again",
            details={"field": "output_schema", "content": turn.content[:_LONGEST_CAUSE]},
        )


def failure(status: int | None, cause: str, *, retry_after: float | None = None, subtype: str = "") -> HypercoreError:
    """Return the domain error for a model request that failed with `status` (None: no answer at all)."""
    told = _told(cause)
    details = {"api_status": status}
    if status == 429:
        return RateLimited(
            "the Claude API's rate limit is reached", details=details, retry_after=max(1.0, retry_after or 1.0)
        )
    if status in (402, 403) and (_BUDGET.search(cause) or _TOKENS.search(cause)):
        return BudgetExceeded(told or "the budget is spent", details=details)
    if status == 401:
        return ModelFailed(
            "the Claude API refused the API key (401); set a valid key for this agent, this user or the platform",
            details={**details, "cause": "api_key"},
        )
    if status is not None and 400 <= status < 500:
        return ModelFailed(f"the Claude API answered {status}: {told}", details=details, retryable=status == 408)
    if status is not None and (silent := _NO_ANSWER.search(cause)):
        return ModelFailed(
            f"{silent[0].strip()} (the connection from the gateway to the API); try again",
            details={"api_status": None, "cause": LOST_CONNECTION},
            retryable=True,
        )
    if status is not None:
        return ModelFailed(f"the Claude API answered {status}; try again", details=details, retryable=True)
    if subtype not in ("", "success"):
        return AgentUnreachable("the Claude CLI gave the turn up; the session goes on with its next turn")
    if "ECONNREFUSED" in cause:
        return no_gateway()
    return ModelFailed(
        "the model's answer broke off: the Claude API or the gateway closed the connection; try again",
        details={**details, "cause": LOST_CONNECTION},
        retryable=True,
    )


def no_gateway() -> Unavailable:
    """Return the error for a turn whose model requests found no gateway."""
    return Unavailable("the platform's model gateway does not answer; try again", retry_after=5)


def _told(cause: str) -> str:
    return _ADDRESS.sub("", _PREFIX.sub("", mask_secrets(cause))).strip()[:_LONGEST_CAUSE]
