"""One user's file transfers against another user's turns and files, on one agent with a real launcher. Needs root."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from hypercore_agents.agent.isolation.files import AT_ONCE
from hypercore_agents.agent.launcher.client import LauncherClient
from hypercore_agents.api.files import READ_LIMIT
from hypercore_agents.api.ids import new_session_id
from support.agent_server import Agent, launched, served_agent, stand_in_gateway, tool, turn
from support.isolation_marks import needs_isolation
from support.simulator_fixtures import RunningSimulator
from support.waiting import until

LARGE = 62 * 2**20
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.root,
    needs_isolation,
]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("agent") / "state"


@pytest.fixture(scope="module")
def launcher(state: Path) -> Iterator[LauncherClient]:
    with launched(state) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agent(simulator_process: RunningSimulator, state: Path, launcher: LauncherClient) -> AsyncIterator[Agent]:
    async with stand_in_gateway(simulator_process.url) as gateway, served_agent(gateway, state, launcher) as agent:
        yield agent


async def bash(agent: Agent, session_id: str, script: str, number: int = 1, user_id: str = "eve") -> dict[str, object]:
    body = turn(tool("Bash", command=script), session_id, number=number, timeout=60, user_id=user_id)
    return await agent.chat(body)


@contextlib.asynccontextmanager
async def download(agent: Agent, session_id: str, path: str) -> AsyncIterator[aiohttp.ClientResponse]:
    """Ask for a file and read nothing of it yet."""
    url = f"{agent.url}/v1/agent/session/{session_id}/files/{path}"
    async with aiohttp.ClientSession(read_bufsize=4096) as client, client.get(url, headers=agent.headers) as answer:
        yield answer


async def test_slow_downloads_of_one_user_leave_anothers_turns_and_files_alone(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacker, victim = new_session_id(), new_session_id()
    await bash(agent, attacker, f"truncate -s {LARGE} large")
    async with contextlib.AsyncExitStack() as held:
        for _ in range(AT_ONCE):
            answer = await held.enter_async_context(download(agent, attacker, "large"))
            assert (answer.status, answer.content_length) == (200, LARGE)
        refused = await held.enter_async_context(download(agent, attacker, "large"))
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        # the victim's side: a workspace as large as all of what sessions once shared, an upload, a download
        done = await bash(agent, victim, "head -c 60000000 /dev/urandom > mine", user_id="ada")
        assert (done["durable"], done["workspace_durable"], done["notices"]) == (True, True, [])
        url = f"{agent.url}/v1/agent/session/{victim}/files/sent"
        async with agent.client.put(url, data=b"x" * 1_000_000, headers=agent.headers) as put:
            assert (put.status, (await put.json())["workspace_durable"]) == (200, True)
        async with download(agent, victim, "mine") as answer:
            assert len(await answer.read()) == 60_000_000
        # as does the attacker's own next turn
        assert (await bash(agent, attacker, "rm large", 2))["workspace_durable"]
    await until(lambda: not agent.server.files()._transfers)


async def test_a_client_that_does_not_read_is_cut_off(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypercore_agents.agent.server.downloads.SLOW_SECONDS", 0.2)
    session_id = new_session_id()
    await bash(agent, session_id, f"truncate -s {LARGE} large")
    async with download(agent, session_id, "large") as answer:
        assert answer.status == 200
        await until(lambda: not agent.server.files()._transfers)
        with pytest.raises(aiohttp.ClientError):
            await answer.read()


async def test_what_is_sent_has_the_size_that_was_checked_whatever_becomes_of_the_file(agent: Agent) -> None:
    session_id = new_session_id()
    await bash(agent, session_id, f"head -c {LARGE} /dev/zero | tr '\\0' a > grows; cp grows shrinks; cp grows large")
    async with download(agent, session_id, "grows") as growing, download(agent, session_id, "shrinks") as shrinking:
        await bash(agent, session_id, f"head -c {READ_LIMIT} /dev/zero >> grows; truncate -s 10 shrinks", 2)
        content = await growing.read()
        assert len(content) == LARGE
        assert content.count(b"a") == LARGE
        with pytest.raises(aiohttp.ClientPayloadError):
            await shrinking.read()
    async with download(agent, session_id, "grows") as answer:
        assert answer.status == 413
    # swapped for another file all the time: each answer is one of both, or none
    swap = f"for i in $(seq 100); do mv large x; truncate -s {READ_LIMIT + 1} large; mv x large; done"
    swapping = asyncio.create_task(bash(agent, session_id, swap, 3))
    seen = set()
    while not swapping.done():
        async with download(agent, session_id, "large") as answer:
            seen.add(answer.status)
            if answer.status == 200:
                assert answer.content_length in (0, LARGE)  # 0: just made
    await swapping
    assert 200 in seen
    assert seen <= {200, 404, 413, 429}  # 429: answers that were not read completely may still be open
