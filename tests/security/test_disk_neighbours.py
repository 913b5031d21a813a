"""Disk limits: however a session writes, it stops at its own limit, and its neighbour's turns and files work on.

The agent's folder is on a separate file system, so that the host's free space is exact to the block. Needs root and
loop devices. `test_microvm_guest` has the same attacks in a microVM.
"""

import asyncio
import contextlib
import hashlib
import io
import os
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hypercore_agents.agent.launcher.client import DiskAtCapacity, LauncherClient
from hypercore_agents.api.ids import new_session_id
from support.agent_server import Agent, exact_disks, tool, turn
from support.isolation_marks import WHY_NO_ISOLATION
from support.launched_agent import LauncherOptions, launched_agent
from support.waiting import until

LIMIT_MB, FILES, HOST_MB = 256, 20_000, 2048
VICTIMS_MB = 16
WHY_NOT = WHY_NO_ISOLATION or (None if exact_disks() else "the kernel does not count sessions' files here")
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.root,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"no exact limit on sessions' disks: {WHY_NOT}"),
]


@pytest.fixture(scope="module")
def host_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system in the role of the host's."""
    place = tmp_path_factory.mktemp("host")
    image, folder = place / "disk", place / "mounted"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(HOST_MB << 20)
    subprocess.run(["/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop,discard", image, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def launcher_state(host_disk: Path) -> Path:
    return host_disk / "state"


@pytest.fixture(scope="module")
def launcher_options() -> LauncherOptions:
    limits = ("--session-disk-mb", str(LIMIT_MB), "--session-files", str(FILES), "--session-memory-mb", "1024")
    return LauncherOptions(limits)


agent = launched_agent


def free_mb(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bfree * disk.f_frsize >> 20


_TAKES = """
import array, errno, mmap, os, socket, sys, time
sys.stdout.reconfigure(line_buffering=True)
held, taken, piece = [], 0, bytes(8 << 20)
def unlinked():
    file = os.open(f"f{len(held)}", os.O_RDWR | os.O_CREAT)
    os.unlink(f"f{len(held)}")
    held.append(file)
    return file
def write():
    file = unlinked()
    for _ in range(4):
        sent = os.write(file, piece)
        yield sent
        if sent < len(piece): raise OSError(errno.ENOSPC, "short")
def allocate():
    os.posix_fallocate(unlinked(), 0, 8 << 20)
    yield 8 << 20
def pass_on():  # the only reference is in transit between two sockets
    file = unlinked()
    yield os.write(file, piece)
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    pair[0].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))])
    os.close(file)
    held[-1] = pair
def name():
    for _ in range(256):
        held.append(None)
        os.mkdir(f"d{len(held)}") if len(held) % 2 else open(f"f{len(held)}", "w").close()
    yield 256
how = {"unlinked": write, "allocated": allocate, "in flight": pass_on, "files": name}[sys.argv[1]]
try:
    while True:
        for took in how(): taken += took
except OSError as error:
    for file in held:
        if isinstance(file, int): os.fsync(file)
    print(f"stopped {errno.errorcode[error.errno]} after {taken}")
until = sys.stdin.read(1)
"""
_MAPS = """
import mmap, os, sys
sys.stdout.reconfigure(line_buffering=True)
while True:  # each mapping outlives its name and descriptor
    file = os.open("f", os.O_RDWR | os.O_CREAT)
    os.unlink("f")
    os.ftruncate(file, 16 << 20)
    mapping = mmap.mmap(file, 16 << 20)
    os.close(file)
    for page in range(0, 16 << 20, 4096): mapping[page] = 1
    globals().setdefault("held", []).append(mapping)
    print(len(held) * 16)
"""


_FILLS = """
import os
for name in os.listdir(".."):
    if os.path.isfile(f"../{name}"): os.remove(f"../{name}")  # or the next start could use its space
file, size = os.open("../tmp/big", os.O_WRONLY | os.O_CREAT), 0
for piece in (16 << 20, 1 << 20, 65536, 4096):
    try:
        while True:
            os.posix_fallocate(file, size, piece)
            size += piece
    except OSError: pass
"""


@contextlib.asynccontextmanager
async def attacking(
    launcher: LauncherClient, session: str, script: str, *words: str
) -> AsyncIterator[asyncio.StreamReader]:
    """Run a script as a session while the caller looks; give what it prints."""
    (stdin, hold), (said, stdout) = os.pipe(), os.pipe()
    process = await launcher.start(
        session, ["/usr/bin/python3", "-c", script, *words], stdin=stdin, stdout=stdout, stderr=stdout
    )
    os.close(stdin)
    os.close(stdout)
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(said, "rb")
    )
    try:
        yield reader
    finally:
        os.close(hold)
        process.kill()
        await process.wait()
        transport.close()


async def victim_works(agent: Agent, session: str, number: int) -> None:
    """Run a turn of the neighbour that writes a file, and read it back unchanged over the files route."""
    script = f"head -c {VICTIMS_MB}M /dev/urandom > kept && sync kept && sha256sum kept | cut -c-64; df -m . | tail -1"
    answer = await agent.chat(turn(tool("Bash", command=script), session, number=number, timeout=60))
    digest = re.search(r"[0-9a-f]{64}", answer["content"])
    assert digest is not None, answer
    assert answer["notices"] == []
    async with agent.client.get(
        f"{agent.url}/v1/agent/session/{session}/files/kept", headers=agent.headers
    ) as response:
        assert response.status == 200
        assert hashlib.sha256(await response.read()).hexdigest() == digest.group()


async def test_attackers_stay_within_limits_while_their_neighbour_works(
    agent: Agent, launcher: LauncherClient, host_disk: Path
) -> None:
    victim = new_session_id()
    await victim_works(agent, victim, 1)
    before = free_mb(host_disk)
    attackers = {how: new_session_id() for how in ("unlinked", "allocated", "in flight", "files", "mapped")}
    async with contextlib.AsyncExitStack() as attacks:
        for how, attacker in attackers.items():
            begin = (
                attacking(launcher, attacker, _MAPS) if how == "mapped" else attacking(launcher, attacker, _TAKES, how)
            )
            said = await attacks.enter_async_context(begin)
            if how == "mapped":  # ends with SIGBUS: no block is left for the page
                taken = int((await asyncio.wait_for(said.read(), 60)).split()[-1]) << 20
            else:
                line = (await asyncio.wait_for(said.readline(), 60)).decode()
                stopped = re.fullmatch(r"stopped ENOSPC after (\d+)\n", line)
                assert stopped is not None, (how, line)
                taken = int(stopped[1])
            limit = FILES if how == "files" else LIMIT_MB << 20
            assert 0.9 * limit <= taken <= limit, how
            usage = await launcher.usage(attacker)
            assert usage is not None
            full = usage.file_limit - usage.files if how == "files" else usage.byte_limit - usage.bytes >> 20
            assert full <= 16 or how == "mapped", how
        await victim_works(agent, victim, 2)
        assert before - free_mb(host_disk) <= len(attackers) * LIMIT_MB + VICTIMS_MB
    for attacker in attackers.values():
        await launcher.remove(attacker)
    await until(lambda: before - free_mb(host_disk) <= VICTIMS_MB + 1)
    await agent.delete(f"/v1/agent/session/{victim}")


async def test_deleted_files_free_space_on_the_host(launcher: LauncherClient, host_disk: Path) -> None:
    session = new_session_id()
    before = free_mb(host_disk)
    write, delete = "head -c 100M /dev/urandom > big && sync big", "rm big && sync -f ."
    assert await launcher.run_as(session, ["/bin/sh", "-c", write]) == 0
    assert before - free_mb(host_disk) >= 100
    assert await launcher.run_as(session, ["/bin/sh", "-c", delete]) == 0
    await until(lambda: before - free_mb(host_disk) <= 5)
    await launcher.remove(session)


async def files_can_be_read_archived_and_deleted(agent: Agent, launcher: LauncherClient, session: str) -> None:
    """Use the files routes of a parked session, and its archive; none of these takes space."""
    files = f"{agent.url}/v1/agent/session/{session}/files"
    async with agent.client.get(files, headers=agent.headers) as response:
        assert response.status == 200, await response.text()
        assert [entry["path"] for entry in (await response.json())["files"]] == ["kept"]
    async with agent.client.get(f"{files}/kept", headers=agent.headers) as response:
        assert (response.status, await response.read()) == (200, b"mine\n")
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as archive, os.fdopen(writing, "wb") as stream:
        assert await launcher.pack(session, stdout=stream.fileno(), stderr=2, timeout=30) == 0
        assert b"mine\n" in os.read(archive.fileno(), 65536)
    async with agent.client.delete(f"{files}/kept", headers=agent.headers) as response:
        assert response.status == 200, await response.text()
    async with agent.client.put(f"{files}/new", data=b"x", headers=agent.headers) as response:
        assert response.status == 503, "a write takes space"
        assert "the host's disk cannot hold" in await response.text()


async def test_disk_reservations_of_sessions_fit_the_host(
    agent: Agent, launcher: LauncherClient, host_disk: Path
) -> None:
    """Only sessions with processes reserve their full limit; operations that take no space need no reservation."""
    hold, inactive = ["/bin/sleep", "600"], new_session_id()
    await agent.chat(turn(tool("Bash", command="echo mine > kept"), inactive, timeout=60))
    assert await agent.server.enrolled().get(inactive).park()
    null = os.open(os.devnull, os.O_RDWR)
    running = {}
    try:
        refusal = ""
        while not refusal:
            session = new_session_id()
            try:
                running[session] = await launcher.start(session, hold, stdin=null, stdout=null, stderr=null)
            except DiskAtCapacity as error:
                refusal = error.message
        assert re.search(r"another session of 256 MB: .* are reserved for other sessions.*SESSION_DISK_MB", refusal)
        assert (len(running) + 1) * LIMIT_MB > free_mb(host_disk) - HOST_MB * 0.05 >= len(running) * LIMIT_MB
        with pytest.raises(DiskAtCapacity):
            await launcher.run_as(inactive, ["/bin/true"])
        await files_can_be_read_archived_and_deleted(agent, launcher, inactive)
        first = next(iter(running))
        running[first].kill()
        await running[first].wait()
        assert await launcher.run_as(inactive, ["/bin/true"]) == 0
    finally:
        for process in running.values():
            process.kill()
        for session in (*running, inactive):
            await launcher.remove(session)
        os.close(null)
        await agent.delete(f"/v1/agent/session/{inactive}")


async def test_a_full_disk_is_reported_to_the_user(agent: Agent, launcher: LauncherClient) -> None:
    session = new_session_id()
    fill = "head -c 1G /dev/zero > big; cat /dev/zero > more; rm -f none"
    answer = await agent.chat(turn(tool("Bash", command=fill), session, timeout=60))
    # the tool's output may be lost: the CLI stores it in a file of the session
    assert any("the session's disk is full: 2" in notice and " MB are used" in notice for notice in answer["notices"])
    async with agent.client.put(
        f"{agent.url}/v1/agent/session/{session}/files/new", data=io.BytesIO(bytes(4 << 20)), headers=agent.headers
    ) as response:
        assert response.status == 413
        assert "the session's disk is full" in (await response.json())["error"]["message"]
    # its files can be shortened, and the session continues
    async with agent.client.put(
        f"{agent.url}/v1/agent/session/{session}/files/big", data=b"", headers=agent.headers
    ) as response:
        assert response.status in (200, 201, 204), await response.text()
    answer = await agent.chat(turn(tool("Bash", command="rm -f more; echo tidy"), session, number=2, timeout=60))
    assert answer["notices"] == []
    await agent.delete(f"/v1/agent/session/{session}")


async def test_a_cli_start_on_a_full_disk_fails_with_the_reason(agent: Agent, launcher: LauncherClient) -> None:
    session, prompt = new_session_id(), "Be brief. " * 10_000
    await agent.chat(turn("[[say hello]]", session, system_prompt=prompt))
    assert await agent.server.enrolled().get(session).park()
    assert await launcher.run_as(session, ["/usr/bin/python3", "-c", _FILLS]) == 0
    status, answer = await agent.post(
        "/v1/agent/chat", turn("[[say hello]]", session, number=2, timeout=60, system_prompt=prompt)
    )
    assert (status, answer["error"]["retryable"]) == (502, False), answer
    assert "the session's disk is full: 2" in answer["error"]["message"]
    assert await launcher.run_as(session, ["/bin/sh", "-c", "rm ../tmp/big"]) == 0
    await agent.chat(turn("[[say hello]]", session, number=3, timeout=60, system_prompt=prompt))
    await agent.delete(f"/v1/agent/session/{session}")
