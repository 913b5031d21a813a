"""Questions of one agent: one user takes all that can be had, another one is still served."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

from hypercore_agents.agent.claude.approvals import Approvals
from hypercore_agents.api.approvals import ApprovalDecision

Ask = Callable[[Any, str | None, Any], Awaitable[dict[str, Any]]]


def asking(approvals: Approvals, user_id: str) -> "asyncio.Task[dict[str, Any]]":
    """Ask a question in a session of the user's own."""
    (matcher,) = approvals.hooks(f"session of {user_id}", user_id, ["*"], lambda _: None)
    ask = cast(Ask, matcher.hooks[0])

    async def answered() -> dict[str, Any]:
        said: dict[str, Any] = (await ask({"tool_name": "Bash"}, "t", None))["hookSpecificOutput"]
        return said

    return asyncio.create_task(answered())


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_waiting_questions_of_one_user_deny_none_of_another_user() -> None:
    approvals = Approvals(limit=15, deadline=60)
    hog = [asking(approvals, "hog") for _ in range(16)]
    await settled()
    assert [task.done() for task in hog] == [False] * 15 + [True]
    refused = hog.pop().result()
    assert refused["permissionDecision"] == "deny"
    assert "15 of this user's, and 15 may" in refused["permissionDecisionReason"]
    victim = asking(approvals, "victim")
    await settled()
    assert not victim.done()
    (question,) = approvals.list("session of victim").approvals
    approvals.resolve("session of victim", question.approval_id, ApprovalDecision(decision="allow"))
    assert (await victim)["permissionDecision"] == "allow"
    assert approvals.of_users() == {"hog": 15}
    approvals.expire("session of hog")
    await asyncio.gather(*hog)


async def test_questions_beyond_the_limit_are_bounded_by_an_equal_share() -> None:
    approvals = Approvals(limit=4, deadline=60)
    tasks = [asking(approvals, user) for user in ("hog",) * 4 + ("ada",) * 3 + ("bob",) * 2]
    await settled()
    assert approvals.of_users() == {"hog": 4, "ada": 2, "bob": 1}
    for user in ("hog", "ada", "bob"):
        approvals.expire(f"session of {user}")
    await asyncio.gather(*tasks)
