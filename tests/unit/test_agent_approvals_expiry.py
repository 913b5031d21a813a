"""Approvals: the order of expiry and interrupt, and no memory of a session that has ended."""

import asyncio
from typing import Any, cast

import pytest

from hypercore_agents.agent.claude.approvals import Approvals
from hypercore_agents.api.approvals import ApprovalDecision
from hypercore_agents.api.errors import Conflict, NotFound


async def test_forget_removes_a_session_from_memory() -> None:
    approvals = Approvals(limit=5, deadline=60)
    published: list[Any] = []
    (matcher,) = approvals.hooks("s", "ada", ["*"], published.append)
    ask = cast(Any, matcher.hooks[0])
    first, second = (asyncio.create_task(ask({"tool_name": "Bash"}, "t", None)) for _ in range(2))
    while approvals.waiting < 2:
        await asyncio.sleep(0)
    approval_id = approvals.list("s").approvals[0].approval_id
    approvals.resolve("s", approval_id, ApprovalDecision(decision="allow"))
    assert (await first)["hookSpecificOutput"]["permissionDecision"] == "allow"
    with pytest.raises(Conflict):
        approvals.resolve("s", approval_id, ApprovalDecision(decision="deny"))
    approvals.forget("s")
    assert (await second)["hookSpecificOutput"]["permissionDecision"] == "deny"
    with pytest.raises(NotFound):
        approvals.resolve("s", approval_id, ApprovalDecision(decision="deny"))
    assert (approvals._waiting, approvals._resolved) == ({}, {})


async def test_a_denial_waits_for_the_interrupt_of_its_turn() -> None:
    approvals = Approvals(limit=5, deadline=60)
    published: list[Any] = []
    (matcher,) = approvals.hooks("s", "ada", ["*"], published.append)
    call = asyncio.create_task(cast(Any, matcher.hooks[0])({"tool_name": "Bash"}, "t", None))
    while not approvals.waiting:
        await asyncio.sleep(0)
    approval_id = approvals.list("s").approvals[0].approval_id
    interrupted = asyncio.Event()
    approvals.expire("s", interrupted=interrupted)
    with pytest.raises(Conflict):
        approvals.resolve("s", approval_id, ApprovalDecision(decision="allow"))
    while len(published) < 2:
        await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)
    assert (published[1].decision, call.done()) == ("approval_expired", False)
    interrupted.set()
    assert (await call)["hookSpecificOutput"]["permissionDecision"] == "deny"
