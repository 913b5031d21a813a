"""Human approval: tool calls that wait for a user's decision.

The gate is a PreToolUse hook, which the Claude CLI asks before every tool call (`can_use_tool` is no gate: harmless
calls run without it). It fails closed: an error in it blocks the call.

Invariants: a question is answered once; about `limit` questions wait in the whole agent, since each holds a live
process. One user may have all of them; another user's questions are then taken beyond the limit, up to an equal share
of it, so nobody's questions are denied because of somebody else's. A question that nobody answered by its deadline,
that came when too many waited, or whose turn ends, is denied as `approval_expired`. An answer after that is a conflict.
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

_REMEMBERED = 64
_HOOK_SLACK_SECONDS = 30.0
_INPUT_LIMIT = 1_000_000
_EXPIRED = {
    "late": "approval_expired: nobody answered in time; the call did not run",
    "full": "approval_expired: too many questions wait already: {used} of this user's, and {limit} may; answer one "
    "first; the call did not run",
    "over": "approval_expired: the turn is ending; the call did not run",
}

Tell = Callable[[ApprovalRequest | Resolved], None]


@dataclass
class _Question:
    request: ApprovalRequest
    user_id: str
    answer: asyncio.Future[ApprovalDecision | None]


class Approvals:
    """The questions of one agent. `limit` may wait at a time, each for `deadline` seconds."""

    def __init__(self, *, limit: int, deadline: float) -> None:
        self.limit = limit
        self._deadline = deadline
        self._waiting: dict[str, dict[str, _Question]] = {}
        self._resolved: dict[str, deque[str]] = {}

    @property
    def waiting(self) -> int:
        """How many questions wait now."""
        return sum(map(len, self._waiting.values()))

    def of_users(self) -> Counter[str]:
        """Return how many questions of each user wait."""
        return Counter(question.user_id for some in self._waiting.values() for question in some.values())

    def most_of(self, user_id: str) -> int:
        """Return how many questions of a user may wait now: what is left of the limit, and at least an equal share."""
        of_users = self.of_users()
        share = self.limit // len({*of_users, user_id})
        return max(1, share, self.limit - self.waiting + of_users[user_id])

    def hooks(self, session_id: str, user_id: str, tools: Sequence[str], tell: Tell) -> list[HookMatcher]:
        """Return the hooks that ask before every call of these tools (names; `*` stands for any letters)."""

        async def ask(data: Any, tool_use_id: str | None, context: Any) -> dict[str, Any]:
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
            decision = await self._decide(session_id, user_id, request, tell)
            return {"hookSpecificOutput": {"hookEventName": "PreToolUse", **decision}}

        self._resolved.setdefault(session_id, deque(maxlen=_REMEMBERED))
        callback = cast(HookCallback, ask)
        return [HookMatcher(hooks=[callback], timeout=self._deadline + _HOOK_SLACK_SECONDS, on_failure="block")]

    def list(self, session_id: str) -> ApprovalList:
        """Return what a session waits for."""
        requests = [question.request for question in self._waiting.get(session_id, {}).values()]
        return ApprovalList(session_id=session_id, count=len(requests), approvals=requests)

    def resolve(self, session_id: str, approval_id: str, decision: ApprovalDecision) -> Resolved:
        """Answer a question. Raises NotFound, or Conflict when it is decided or expired."""
        question = self._waiting.get(session_id, {}).get(approval_id)
        if question is None or question.answer.done():
            if question is not None or approval_id in self._resolved.get(session_id, ()):
                raise Conflict(
                    "this question is decided or expired; its call has run or was denied",
                    details={"approval_id": approval_id},
                )
            raise NotFound("this session waits for no such approval")
        question.answer.set_result(decision)
        return Resolved(approval_id=approval_id, decision=decision.decision)

    def expire(self, session_id: str) -> None:
        """Deny whatever a session waits for: its turn is ending."""
        for question in self._waiting.get(session_id, {}).values():
            if not question.answer.done():
                question.answer.set_result(None)

    def forget(self, session_id: str) -> None:
        """The session is gone from this agent."""
        self.expire(session_id)
        self._resolved.pop(session_id, None)

    async def _decide(self, session_id: str, user_id: str, request: ApprovalRequest, tell: Tell) -> dict[str, Any]:
        outcome: ApprovalOutcome = "approval_expired"
        answer: ApprovalDecision | None = None
        why = "full"
        used, limit = self.of_users()[user_id], self.most_of(user_id)
        if used < limit:
            future: asyncio.Future[ApprovalDecision | None] = asyncio.get_running_loop().create_future()
            questions = self._waiting.setdefault(session_id, {})
            questions[request.approval_id] = _Question(request, user_id, future)
            try:
                tell(request)
                async with asyncio.timeout(self._deadline):
                    answer = await future
                why = "over"
            except TimeoutError:
                why = "late"
            finally:
                del questions[request.approval_id]
                if not questions:
                    self._waiting.pop(session_id, None)
                if session_id in self._resolved:  # else the session is gone
                    self._resolved[session_id].append(request.approval_id)
        if answer is not None:
            outcome = answer.decision
        tell(Resolved(approval_id=request.approval_id, decision=outcome))
        if answer is None:
            reason = _EXPIRED[why].format(used=used, limit=limit)
            return {"permissionDecision": "deny", "permissionDecisionReason": reason}
        if answer.decision == "deny":
            reason = answer.message or "the user denied this call"
            return {"permissionDecision": "deny", "permissionDecisionReason": reason}
        allowed: dict[str, Any] = {"permissionDecision": "allow", "permissionDecisionReason": "the user allowed it"}
        return allowed | ({"updatedInput": answer.input} if answer.input is not None else {})


def _bounded(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a tool's input as the user is shown it: an endless one is not carried around."""
    if len(str(arguments)) <= _INPUT_LIMIT:
        return arguments
    return {"cut": f"the input has more than {_INPUT_LIMIT} characters", "start": str(arguments)[:10_000]}
