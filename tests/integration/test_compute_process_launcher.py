"""The process backend as root: agents of this installation start under a launcher, and end completely."""

import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from hypercore_agents.api.ids import new_agent_id, new_session_id
from hypercore_agents.compute.base import InsufficientResources, SandboxRequest
from hypercore_agents.compute.host import users
from hypercore_agents.compute.process import ProcessBackend
from support.agent_server import StandInGateway, exact_disks, stand_in_gateway, tool, turn
from support.isolation_marks import WHY_NO_ISOLATION
from support.simulator_fixtures import RunningSimulator
from support.waiting import until

WHY_NOT = WHY_NO_ISOLATION or users.why_no_separate_users(users.AGENT_UIDS, users.CLAIMS, [])
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.root,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"sessions cannot be isolated here: {WHY_NOT}"),
]


@pytest_asyncio.fixture
async def backend(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ProcessBackend]:
    place = tmp_path_factory.mktemp("backend")
    for folder in (place, place.parent, place.parent.parent):
        folder.chmod(0o755)
    backend = ProcessBackend(place / "state")
    if not backend.capabilities.separates_sessions:
        pytest.skip(backend.capabilities.isolation)
    yield backend
    for sandbox in await backend.list():
        await backend.stop(sandbox.agent_id, grace=0)
    await backend.close()


async def started(backend: ProcessBackend, gateway: StandInGateway, http: aiohttp.ClientSession) -> tuple[str, str]:
    request = SandboxRequest(
        agent_id=new_agent_id(),
        cores=2,
        memory_mb=2048,
        gateway_url=gateway.url,
        enrolment_secret=gateway.secret,
        environment={"AGENT_MEMORY_MB": "2048"},
    )
    sandbox = await backend.start(request)

    for _ in range(600):
        async with http.get(f"{sandbox.address}/ready") as answer:
            if answer.status == 200:
                return request.agent_id, sandbox.address
    raise AssertionError((await backend.logs(request.agent_id)).decode())


@pytest.mark.parametrize("how", ["asked", "killed"])
async def test_an_agents_sessions_are_isolated_and_end_with_it(
    backend: ProcessBackend, simulator: RunningSimulator, how: str
) -> None:
    async with stand_in_gateway(simulator.url) as gateway, aiohttp.ClientSession() as http:
        gateway.configuration = gateway.configuration.model_copy(update={"needs_separation": True})
        agent_id, address = await started(backend, gateway, http)
        daemon = "id -u; setsid env -i sleep 600 > /dev/null 2>&1 < /dev/null & sleep 0.1"
        async with http.post(
            f"{address}/v1/agent/chat",
            json=turn(tool("Bash", command=daemon), new_session_id(), timeout=60),
            headers={"authorization": f"Bearer {gateway.bearer}"},
        ) as answer:
            said = await answer.json()
            assert answer.status == 200, said
        uid = int(next(user for user in Path(users.CLAIMS).iterdir() if agent_id in user.read_text()).name)
        sessions = users.session_uids(uid)
        assert sessions is not None
        assert int(said["content"].partition('"')[2].splitlines()[0]) in sessions
        assert len(list(users.processes_of(uid))) >= 4  # server, init, CLI, daemon
        async with http.get(f"{address}/health") as answer:
            health = await answer.json()
            assert (health["sessions_kept_apart"], health["tools"]) == (True, "on")
        await backend.stop(agent_id, grace=20 if how == "asked" else 0)
        await until(lambda: not list(users.processes_of(uid)), seconds=1)
        assert await backend.list() == []
        assert not list(Path("/sys/fs/cgroup").glob(f"*/*{agent_id}*"))


def loops_below(folder: Path) -> list[str]:
    """Return the loop devices whose file is below a folder, or was before its deletion."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if backing.read_text().startswith(f"{folder}/"):
                found.append(backing.parts[3])
    return found


@pytest.mark.skipif(not exact_disks(), reason="no loop devices here")
@pytest.mark.parametrize("who", ["launcher", "manager"])
async def test_the_disks_of_sessions_are_removed_with_their_agent(
    backend: ProcessBackend, simulator: RunningSimulator, who: str
) -> None:
    assert backend.capabilities.exact_disk
    sandboxes = backend._sandboxes
    async with stand_in_gateway(simulator.url) as gateway, aiohttp.ClientSession() as http:
        agent_id, address = await started(backend, gateway, http)
        script = tool("Bash", command="echo kept > note; df . | tail -1")
        async with http.post(
            f"{address}/v1/agent/chat",
            json=turn(script, new_session_id(), timeout=60),
            headers={"authorization": f"Bearer {gateway.bearer}"},
        ) as answer:
            assert "/dev/loop" in (await answer.json())["content"]
        async with http.get(f"{address}/health") as answer:
            assert (await answer.json())["session_disk"].startswith("exact: each session has its own file system")
        assert loops_below(sandboxes)
        assert (await backend.usage()).disk_used_mb >= 1024
        mounts = Path("/proc/self/mountinfo").read_text()
        assert str(sandboxes) not in mounts, "mounts are the launcher's own"
        record = backend._directory(agent_id).read()
        assert record is not None
        assert record.agent is not None
        if who == "manager":  # its successor, over the same state, finds the leftovers
            successor = ProcessBackend(sandboxes.parent)
            await successor.stop(agent_id, grace=0)
            await successor.close()
        else:
            os.kill(record.agent.pid, signal.SIGKILL)
        await until(lambda: not loops_below(sandboxes))
        await backend.stop(agent_id, grace=0)
        assert not (sandboxes / agent_id).exists()
        assert (await backend.usage()).disk_used_mb == 0


@pytest.mark.skipif(not exact_disks(), reason="no loop devices here")
async def test_an_agent_is_refused_if_the_disk_cannot_hold_a_session(
    backend: ProcessBackend, simulator: RunningSimulator
) -> None:
    greedy = ProcessBackend(backend._sandboxes.parent, session_disk_mb=1 << 30)
    request = SandboxRequest(
        agent_id=new_agent_id(), cores=1, memory_mb=512, gateway_url="http://127.0.0.1:9", enrolment_secret="secret"
    )
    try:
        with pytest.raises(InsufficientResources, match=r"1073741824 MB \(SESSION_DISK_MB\)"):
            await greedy.start(request)
        assert await greedy.list() == []
    finally:
        await greedy.close()
