"""File transfers of one user do not affect another user, on one agent with a real launcher. Needs root."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiohttp
import pytest

from hypercore_agents.agent.isolation.files import AT_ONCE
from hypercore_agents.api.files import READ_LIMIT
from hypercore_agents.api.ids import new_session_id
from support.agent_server import Agent
from support.isolation_marks import needs_isolation
from support.launched_agent import launched_agent, run_bash
from support.waiting import until

LARGE = 62 * 2**20
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.root,
    needs_isolation,
]


agent = launched_agent


@contextlib.asynccontextmanager
async def download(agent: Agent, session_id: str, path: str) -> AsyncIterator[aiohttp.ClientResponse]:
    """Request a file without reading its content yet."""
    url = f"{agent.url}/v1/agent/session/{session_id}/files/{path}"
    async with aiohttp.ClientSession(read_bufsize=4096) as client, client.get(url, headers=agent.headers) as answer:
        yield answer


async def test_slow_downloads_of_one_user_do_not_block_another_user(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacker, victim = new_session_id(), new_session_id()
    await run_bash(agent, f"truncate -s {LARGE} large", attacker, user_id="eve")
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(AT_ONCE):
            answer = await stack.enter_async_context(download(agent, attacker, "large"))
            assert (answer.status, answer.content_length) == (200, LARGE)
        refused = await stack.enter_async_context(download(agent, attacker, "large"))
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        # the victim: a large workspace, an upload, a download
        done = await run_bash(agent, "head -c 60000000 /dev/urandom > mine", victim, user_id="ada")
        assert (done["durable"], done["workspace_durable"], done["notices"]) == (True, True, [])
        url = f"{agent.url}/v1/agent/session/{victim}/files/sent"
        async with agent.client.put(url, data=b"x" * 1_000_000, headers=agent.headers) as put:
            assert (put.status, (await put.json())["workspace_durable"]) == (200, True)
        async with download(agent, victim, "mine") as answer:
            assert len(await answer.read()) == 60_000_000
        # the attacker's next turn works as well
        assert (await run_bash(agent, "rm large", attacker, number=2, user_id="eve"))["workspace_durable"]
    await until(lambda: not agent.server.files()._transfers)


async def test_a_download_that_is_not_read_is_closed(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypercore_agents.agent.server.downloads.SLOW_SECONDS", 0.2)
    session_id = new_session_id()
    await run_bash(agent, f"truncate -s {LARGE} large", session_id, user_id="eve")
    async with download(agent, session_id, "large") as answer:
        assert answer.status == 200
        await until(lambda: not agent.server.files()._transfers)
        with pytest.raises(aiohttp.ClientError):
            await answer.read()


async def test_a_download_has_the_checked_size_even_if_the_file_changes(agent: Agent) -> None:
    session_id = new_session_id()
    await run_bash(
        agent,
        f"head -c {LARGE} /dev/zero | tr '\\0' a > grows; cp grows shrinks; cp grows large",
        session_id,
        user_id="eve",
    )
    async with download(agent, session_id, "grows") as growing, download(agent, session_id, "shrinks") as shrinking:
        await run_bash(
            agent,
            f"head -c {READ_LIMIT} /dev/zero >> grows; truncate -s 10 shrinks",
            session_id,
            number=2,
            user_id="eve",
        )
        content = await growing.read()
        assert len(content) == LARGE
        assert content.count(b"a") == LARGE
        with pytest.raises(aiohttp.ClientPayloadError):
            await shrinking.read()
    async with download(agent, session_id, "grows") as answer:
        assert answer.status == 413
    # while the file is replaced repeatedly, each response has either file, or none
    swap = f"for i in $(seq 100); do mv large x; truncate -s {READ_LIMIT + 1} large; mv x large; done"
    swapping = asyncio.create_task(run_bash(agent, swap, session_id, number=3, user_id="eve"))
    seen = set()
    while not swapping.done():
        async with download(agent, session_id, "large") as answer:
            seen.add(answer.status)
            if answer.status == 200:
                assert answer.content_length in (0, LARGE)  # 0: just created
    await swapping
    assert 200 in seen
    assert seen <= {200, 404, 413, 429}  # 429: unread responses may still be open
