"""Pending approvals on one agent: one user exhausts their share, and another user is still served."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

from hypercore_agents.agent.claude.approvals import Approvals
from hypercore_agents.api.approvals import ApprovalDecision

Ask = Callable[[Any, str | None, Any], Awaitable[dict[str, Any]]]


def request_approval(approvals: Approvals, user_id: str) -> "asyncio.Task[dict[str, Any]]":
    """Request an approval in a session of this user."""
    (matcher,) = approvals.hooks(f"session of {user_id}", user_id, ["*"], lambda _: None)
    ask = cast(Ask, matcher.hooks[0])

    async def decision() -> dict[str, Any]:
        output: dict[str, Any] = (await ask({"tool_name": "Bash"}, "t", None))["hookSpecificOutput"]
        return output

    return asyncio.create_task(decision())


async def run_ready_tasks() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_pending_approvals_of_one_user_do_not_deny_those_of_another() -> None:
    approvals = Approvals(limit=15, deadline=60)
    hog = [request_approval(approvals, "hog") for _ in range(16)]
    await run_ready_tasks()
    assert [task.done() for task in hog] == [False] * 15 + [True]
    refused = hog.pop().result()
    assert refused["permissionDecision"] == "deny"
    assert "this user has 15 waiting approval requests, and at most 15 may wait" in refused["permissionDecisionReason"]
    victim = request_approval(approvals, "victim")
    await run_ready_tasks()
    assert not victim.done()
    (question,) = approvals.list("session of victim").approvals
    approvals.resolve("session of victim", question.approval_id, ApprovalDecision(decision="allow"))
    assert (await victim)["permissionDecision"] == "allow"
    assert approvals.count_by_user() == {"hog": 15}
    approvals.expire("session of hog")
    await asyncio.gather(*hog)


async def test_approvals_beyond_the_limit_are_bounded_by_an_equal_share() -> None:
    approvals = Approvals(limit=4, deadline=60)
    tasks = [request_approval(approvals, user) for user in ("hog",) * 4 + ("ada",) * 3 + ("bob",) * 2]
    await run_ready_tasks()
    assert approvals.count_by_user() == {"hog": 4, "ada": 2, "bob": 1}
    for user in ("hog", "ada", "bob"):
        approvals.expire(f"session of {user}")
    await asyncio.gather(*tasks)
