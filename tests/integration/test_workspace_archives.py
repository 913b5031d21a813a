"""Workspace archives at their stated limit: the real launcher, the real tar, a real gateway with its store. Needs root.

One launcher and one gateway serve the module.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from hypercore_agents.agent.gateway.client import GatewayClient
from hypercore_agents.agent.isolation.backends import PerSessionIsolation
from hypercore_agents.agent.isolation.pipes import output_of
from hypercore_agents.agent.launcher.client import LauncherClient
from hypercore_agents.agent.persistence.archive_format import LONGEST_PATH
from hypercore_agents.agent.persistence.workspace_archive import WorkspaceArchive
from hypercore_agents.api.errors import PayloadTooLarge
from hypercore_agents.api.ids import new_session_id
from hypercore_agents.api.internal import AgentToken
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.store.database import sqlite_url
from support.agent_server import FIRST_USER as FIRST
from support.agent_server import Agent, launched, served_agent, stand_in_gateway, tool, turn
from support.folders_in_use import files_below
from support.gateway_server import POOL, Site, gateway_site
from support.isolation_marks import needs_isolation
from support.simulator_fixtures import RunningSimulator

LIMIT = 256 * 2**20
MEMORY = 256 * 2**20
"""How much memory four archives of LIMIT may take, agent and gateway together."""
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.root,
    needs_isolation,
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("gateway")
    async with gateway_site(folder, sqlite_url(folder / "store.db"), "http://127.0.0.1:9") as site:
        yield site


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tasks() -> AsyncIterator[Tasks]:
    tasks = Tasks("test")
    yield tasks
    await tasks.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(site: Site) -> AsyncIterator[GatewayClient]:
    token, expires = site.tokens.for_agent(POOL)
    client = GatewayClient(site.url, AgentToken(agent_token=token, expires_at=expires))
    yield client
    await client.close()


@pytest.fixture
def isolation(launcher: LauncherClient, site: Site, tasks: Tasks) -> PerSessionIsolation:
    return PerSessionIsolation(launcher, site.url, tasks)


def archive_of(
    session_id: str, isolation: PerSessionIsolation, gateway: GatewayClient, tasks: Tasks
) -> WorkspaceArchive:
    folder = isolation.folder(session_id)
    return WorkspaceArchive(session_id, folder, isolation, gateway, tasks, limit=LIMIT, entries=50_000)


async def shell(isolation: PerSessionIsolation, session_id: str, script: str) -> None:
    folder = isolation.folder(session_id)
    assert await isolation.run_as(folder, ["sh", "-ec", script]) == 0, script


async def test_four_archives_of_the_largest_size_need_bounded_memory(
    isolation: PerSessionIsolation, gateway: GatewayClient, site: Site, tasks: Tasks
) -> None:
    sessions = [await site.session(user_id=f"user-{number}") for number in range(4)]
    fill = f"head -c {LIMIT - 4_000_000} /dev/urandom > large; head -c 4000000 /dev/urandom > small"
    await asyncio.gather(*(shell(isolation, session, fill) for session in sessions))
    before = {session: await content_of(isolation, session) for session in sessions}
    memory = reset_peak()
    archives = {session: archive_of(session, isolation, gateway, tasks) for session in sessions}
    saved = await asyncio.gather(*(archive.save(1) for archive in archives.values()))
    assert [each.missing for each in saved] == [None] * 4
    # as on another agent that takes the sessions over: their folders are gone here
    await asyncio.gather(*(isolation.remove(isolation.folder(session)) for session in sessions))
    for session in sessions:
        await shell(isolation, session, "true")
    again = {session: archive_of(session, isolation, gateway, tasks) for session in sessions}
    digests = {session: archive.digest or "" for session, archive in archives.items()}
    await asyncio.gather(*(again[session].restore(1, digests[session]) for session in sessions))
    grown = peak() - memory
    assert {session: await content_of(isolation, session) for session in sessions} == before
    assert grown < MEMORY, f"{grown >> 20} MB"
    # unchanged, so nothing is sent again; one byte more is too much and is refused
    stored = list(files_below(site.settings.state_dir / "blobs/workspaces"))
    one = sessions[0]
    assert await again[one].save(1) == (None,)
    await shell(isolation, one, "printf x >> small")
    with pytest.raises(PayloadTooLarge, match="WORKSPACE_MAX_MB"):
        await again[one].save(1)
    assert sorted(files_below(site.settings.state_dir / "blobs/workspaces")) == sorted(stored)
    for session in sessions:
        await isolation.remove(isolation.folder(session))


async def content_of(isolation: PerSessionIsolation, session_id: str) -> str:
    """Return a digest of a session's files."""
    return await output_of_script(isolation, session_id, "find . -type f -print0 | sort -z | xargs -0 sha256sum")


async def output_of_script(isolation: PerSessionIsolation, session_id: str, script: str) -> str:
    """Return the output of a script that runs in the session."""
    folder = isolation.folder(session_id)
    command = ["sh", "-ec", script]
    async with output_of(lambda out, err: isolation.run_as(folder, command, stdout=out, stderr=err)) as printed:
        text = b""
        while piece := await printed.read(60):
            text += piece
        assert await printed.status() == 0, await printed.errors()
    return text.decode()


def reset_peak() -> int:
    """Reset the peak of this process's memory; return its current use, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


async def test_files_without_permissions_are_restored_with_their_modes(
    isolation: PerSessionIsolation, gateway: GatewayClient, site: Site, tasks: Tasks
) -> None:
    session_id = await site.session()
    await shell(
        isolation, session_id,
        "echo k > a; mkdir -p d/e; echo l > d/e/f; ln d/e/f g; ln -s /etc/shadow link; chmod 000 a d/e/f d/e d",
    )  # fmt: skip
    archive = archive_of(session_id, isolation, gateway, tasks)
    assert await archive.save(1) == (None,)
    await isolation.remove(isolation.folder(session_id))
    await shell(isolation, session_id, "true")
    await archive_of(session_id, isolation, gateway, tasks).restore(1, archive.digest or "")
    seen = await output_of_script(
        isolation, session_id,
        "stat -c %a a d; chmod 700 d; stat -c %a d/e; chmod 700 d/e; stat -c %a d/e/f; readlink link; "
        "chmod 600 a g; cat a d/e/f g",
    )  # fmt: skip
    assert seen == "0\n0\n0\n0\n/etc/shadow\nk\nl\nl\n"
    await isolation.remove(isolation.folder(session_id))


@pytest.mark.parametrize("name", ["n" * 250, "d"])
async def test_the_longest_path_is_restored_and_a_longer_one_is_not_archived(
    isolation: PerSessionIsolation, gateway: GatewayClient, site: Site, tasks: Tasks, name: str
) -> None:
    session_id = await site.session()
    levels = (LONGEST_PATH - 30) // (len(name) + 1)
    deep = (
        "import os, sys\nfor _ in range(int(sys.argv[1])):\n os.mkdir(sys.argv[2]); os.chdir(sys.argv[2])\n"
        "open('end', 'w').write('k')"
    )
    await shell(isolation, session_id, f'echo l > beside; /usr/bin/python3 -c "{deep}" {levels} {name}')
    archive = archive_of(session_id, isolation, gateway, tasks)
    assert await archive.save(1) == (None,)
    digest = archive.digest or ""
    await shell(isolation, session_id, f'mkdir x; cd x; /usr/bin/python3 -c "{deep}" {2 * levels} {name}')
    with pytest.raises(PayloadTooLarge, match="path of more than"):
        await archive.save(1)
    assert archive.digest == digest
    await isolation.remove(isolation.folder(session_id))
    await shell(isolation, session_id, "true")
    await archive_of(session_id, isolation, gateway, tasks).restore(1, digest)
    assert await output_of_script(isolation, session_id, "cat beside; find . -name end | wc -l") == "l\n1\n"
    await isolation.remove(isolation.folder(session_id))


@pytest.mark.parametrize(
    "trick",
    [
        "cd ..; mv workspace w; ln -s /etc workspace",
        "ln -s /etc ../config/projects; echo x > x",
        "rm -rf ../config; ln -s /etc ../config; echo x > x",
    ],
)
async def test_packing_follows_no_link_out_of_the_session(
    isolation: PerSessionIsolation,
    gateway: GatewayClient,
    site: Site,
    tasks: Tasks,
    launcher: LauncherClient,
    trick: str,
) -> None:
    """The pack command may read every file in its view, so no link may lead it out of the session."""
    session_id = await site.session()
    await shell(isolation, session_id, trick)
    async with output_of(lambda out, err: launcher.pack(session_id, stdout=out, stderr=err, timeout=30)) as packing:
        stream = b""
        while piece := await packing.read(30):
            stream += piece
    assert b"shadow" not in stream
    assert b"root:" not in stream
    await isolation.remove(isolation.folder(session_id))


async def test_only_the_pack_command_may_read_every_file(
    isolation: PerSessionIsolation, launcher: LauncherClient
) -> None:
    session_id = new_session_id()
    await shell(isolation, session_id, "echo k > a; chmod 000 a; ! cat a; grep -q 'CapEff:.0*$' /proc/self/status")
    await shell(isolation, session_id, "grep -q 'CapAmb:.0*$' /proc/self/status")
    await launcher.remove(session_id)


async def test_saved_tool_results_are_present_after_a_move(
    simulator_process: RunningSimulator,
    launcher_state: Path,
    launcher: LauncherClient,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The CLI saves a long output to a file beside its transcript, and the transcript points to that file."""
    session_id = new_session_id()
    second = tmp_path_factory.mktemp("second") / "state"
    saved = "/session/config/projects/-session-workspace/*/tool-results/*"
    async with stand_in_gateway(simulator_process.url) as gateway:
        async with served_agent(gateway, launcher_state, launcher) as one:
            answer = await chat(one, session_id, 1, "seq 1 60000; echo k > a; chmod 000 a")
            assert (answer["durable"], answer["workspace_durable"]) == (True, True), answer
        gateway.enrolments.clear()
        assert any("tool-results/" in entry.line for entry in gateway.transcripts[session_id].values())
        with launched(second, users=100, first=FIRST + 6_000) as other:
            async with served_agent(gateway, second, other) as two:
                answer = await chat(two, session_id, 2, f"tail -n 1 {saved}; ls {saved} | wc -l; stat -c %a a", 2)
                assert "60000\n1\n0" in str(answer["content"]), answer


async def chat(agent: Agent, session_id: str, number: int, script: str, generation: int = 1) -> dict[str, object]:
    body = turn(tool("Bash", command=script), session_id, number=number, generation=generation, timeout=60)
    return await agent.chat(body)
