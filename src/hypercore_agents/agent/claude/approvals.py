"""Human approval: tool calls that wait for a user's decision.

The gate is a PreToolUse hook, which the Claude CLI calls before every tool call (`can_use_tool` is no gate: harmless
calls run without it). It fails closed: an error in it blocks the call.

Invariants: a request is decided once. About `limit` requests wait in the whole agent, since each holds a live process.
One user may have all of them; requests of another user are then accepted beyond the limit, up to an equal share of it,
so no user's requests are denied because of another user. A request is denied as `approval_expired` if it is not decided
by its deadline, if it exceeds the limit, or if its turn ends. A decision after that is a conflict.

A stopped turn's requests expire at once, but their denials reach the CLI only after the interrupt. A denial before it
would be a tool result that the CLI sends to the model, and the turn could complete instead of being interrupted.
"""

import asyncio
import fnmatch
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from claude_agent_sdk import HookMatcher
from claude_agent_sdk.types import HookCallback

from hypercore_agents.api.approvals import ApprovalDecision, ApprovalList, ApprovalOutcome, ApprovalRequest
from hypercore_agents.api.approvals import ApprovalResolved as Resolved
from hypercore_agents.api.errors import Conflict, NotFound

_REMEMBERED_IDS = 64
_HOOK_SLACK_SECONDS = 30.0
_INPUT_LIMIT = 1_000_000
_EXPIRED = {
    "late": "approval_expired: no decision came in time; the call did not run",
    "full": "approval_expired: this user has {used} waiting approval requests, and at most {limit} may wait; decide "
    "one first; the call did not run",
    "over": "approval_expired: the turn is ending; the call did not run",
}

OnEvent = Callable[[ApprovalRequest | Resolved], None]


@dataclass
class _Waiting:
    request: ApprovalRequest
    user_id: str
    decision: asyncio.Future[ApprovalDecision | None]
    interrupted: asyncio.Event | None = None
    """Set when the CLI has been interrupted; a denial waits for it. None: a denial waits for nothing."""


class Approvals:
    """The approval requests of one agent. `limit` may wait at a time, each for `deadline` seconds."""

    def __init__(self, *, limit: int, deadline: float) -> None:
        self.limit = limit
        self._deadline = deadline
        self._waiting: dict[str, dict[str, _Waiting]] = {}
        self._resolved: dict[str, deque[str]] = {}

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return sum(map(len, self._waiting.values()))

    def count_by_user(self) -> Counter[str]:
        """Return the number of waiting requests by user."""
        return Counter(waiting.user_id for of_session in self._waiting.values() for waiting in of_session.values())

    def limit_of_user(self, user_id: str) -> int:
        """Return how many requests of a user may wait now: the rest of the limit, and at least an equal share."""
        counts = self.count_by_user()
        share = self.limit // len({*counts, user_id})
        return max(1, share, self.limit - self.waiting + counts[user_id])

    def hooks(self, session_id: str, user_id: str, tools: Sequence[str], on_event: OnEvent) -> list[HookMatcher]:
        """Return hooks that request approval for each call of these tools (names; `*` matches any characters)."""

        async def request_approval(data: Any, tool_use_id: str | None, context: Any) -> dict[str, Any]:
            name = str(data.get("tool_name", ""))[:256]
            if not any(fnmatch.fnmatchcase(name, tool) for tool in tools):
                return {}
            arguments = data.get("tool_input")
            request = ApprovalRequest(
                approval_id=str(uuid.uuid4()),
                tool_use_id=str(tool_use_id or data.get("tool_use_id") or "")[:256],
                name=name,
                input=_bounded(arguments if isinstance(arguments, dict) else {}),
                expires_at=(datetime.now(UTC) + timedelta(seconds=self._deadline)).isoformat(timespec="milliseconds"),
            )
            decision = await self._decide(session_id, user_id, request, on_event)
            return {"hookSpecificOutput": {"hookEventName": "PreToolUse", **decision}}

        self._resolved.setdefault(session_id, deque(maxlen=_REMEMBERED_IDS))
        callback = cast(HookCallback, request_approval)
        return [HookMatcher(hooks=[callback], timeout=self._deadline + _HOOK_SLACK_SECONDS, on_failure="block")]

    def list(self, session_id: str) -> ApprovalList:
        """Return the waiting requests of a session."""
        requests = [waiting.request for waiting in self._waiting.get(session_id, {}).values()]
        return ApprovalList(session_id=session_id, count=len(requests), approvals=requests)

    def resolve(self, session_id: str, approval_id: str, decision: ApprovalDecision) -> Resolved:
        """Decide a request. Raises NotFound, or Conflict when it is decided or expired."""
        waiting = self._waiting.get(session_id, {}).get(approval_id)
        if waiting is None or waiting.decision.done():
            if waiting is not None or approval_id in self._resolved.get(session_id, ()):
                raise Conflict(
                    "this approval request is decided or expired; its call has run or was denied",
                    details={"approval_id": approval_id},
                )
            raise NotFound("this session has no such approval request")
        waiting.decision.set_result(decision)
        return Resolved(approval_id=approval_id, decision=decision.decision)

    def expire(self, session_id: str, *, interrupted: asyncio.Event | None = None) -> None:
        """Deny all waiting requests of a session, because its turn is ending.

        The CLI receives the denials once `interrupted` is set, which must happen even if the interrupt fails.
        """
        for waiting in self._waiting.get(session_id, {}).values():
            if not waiting.decision.done():
                waiting.interrupted = interrupted
                waiting.decision.set_result(None)

    def forget(self, session_id: str) -> None:
        """Remove a session that has left this agent."""
        self.expire(session_id)
        self._resolved.pop(session_id, None)

    async def _decide(
        self, session_id: str, user_id: str, request: ApprovalRequest, on_event: OnEvent
    ) -> dict[str, Any]:
        outcome: ApprovalOutcome = "approval_expired"
        answer: ApprovalDecision | None = None
        why = "full"
        interrupted: asyncio.Event | None = None
        used, limit = self.count_by_user()[user_id], self.limit_of_user(user_id)
        if used < limit:
            of_session = self._waiting.setdefault(session_id, {})
            waiting = _Waiting(request, user_id, asyncio.get_running_loop().create_future())
            of_session[request.approval_id] = waiting
            try:
                on_event(request)
                async with asyncio.timeout(self._deadline):
                    answer = await waiting.decision
                interrupted = waiting.interrupted
                why = "over"
            except TimeoutError:
                why = "late"
            finally:
                del of_session[request.approval_id]
                if not of_session:
                    self._waiting.pop(session_id, None)
                if session_id in self._resolved:  # otherwise the session has left this agent
                    self._resolved[session_id].append(request.approval_id)
        if answer is not None:
            outcome = answer.decision
        on_event(Resolved(approval_id=request.approval_id, decision=outcome))
        if interrupted is not None:
            await interrupted.wait()
        if answer is None:
            reason = _EXPIRED[why].format(used=used, limit=limit)
            return {"permissionDecision": "deny", "permissionDecisionReason": reason}
        if answer.decision == "deny":
            reason = answer.message or "the user denied this call"
            return {"permissionDecision": "deny", "permissionDecisionReason": reason}
        allowed: dict[str, Any] = {"permissionDecision": "allow", "permissionDecisionReason": "the user allowed it"}
        return allowed | ({"updatedInput": answer.input} if answer.input is not None else {})


def _bounded(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a tool's input for the user, cut if it is too long."""
    if len(str(arguments)) <= _INPUT_LIMIT:
        return arguments
    return {"cut": f"the input has more than {_INPUT_LIMIT} characters", "start": str(arguments)[:10_000]}
