"""The real image, booted cold under TCG: identity, enrolment, a turn with the real CLI, what the guest is like inside,
and tools that try to get out or to take everything.

One boot for all of it: the tests of a class would each pay half a minute.
"""

import asyncio
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from hypercore_agents.api.guest import message
from hypercore_agents.compute.microvm.accelerator import probe
from hypercore_agents.compute.microvm.image import Image, verify
from support.agent_server import StandInGateway, stand_in_gateway, tool, turn
from support.microvm_fixtures import SCRATCH_MB, booted, identity
from support.simulator_fixtures import RunningSimulator

AGENT = "agent-0123456789abcdef"
INSIDE = """
id -u; git --version; rg --version | sed -n 1p; claude --version
touch /usr/forbidden 2>&1; grep CapEff /proc/self/status; grep NoNewPrivs /proc/self/status
stat -f -c %T /session; uname -r; date +%s; ls /dev | tr '\\n' ' '; echo; cat /proc/cmdline
unshare --user true 2>&1; find /usr -perm /6000 -type f 2>/dev/null
""".strip()
HOSTILE = """
(exec 3<>/dev/tcp/10.0.2.2/{port}) 2>/dev/null || echo no way to the host
(exec 3<>/dev/tcp/10.0.2.15/8080) 2>/dev/null || (exec 3<>/dev/tcp/127.0.0.1/8080) 2>/dev/null || echo no way to the server
python3 -c 'b = [bytearray(1 << 20) for _ in range(2000)]' 2>/dev/null || echo hog killed
python3 -c '
import os, time
children = []
try:
    for _ in range(5000):
        child = os.fork()
        if child == 0: time.sleep(60); os._exit(0)
        children.append(child)
except OSError: print("bomb over", flush=True)
for child in children: os.kill(child, 9)'
head -c 400M /dev/zero > flood 2>/dev/null || echo file cut; rm -f flood
""".strip()  # noqa: E501

TAKES = """
setsid python3 -c '
import errno, os, time
held, taken = [], 0
try:
    for number in range(1 << 20): open(str(number), "w").close()
except OSError as error: first = errno.errorcode[error.errno]
for name in range(1000): os.remove(str(name))
try:
    while True:
        held.append(os.open("f", os.O_RDWR | os.O_CREAT)); os.unlink("f")
        if len(held) % 2: taken += os.write(held[-1], bytes(4 << 20))
        else: os.posix_fallocate(held[-1], 0, 4 << 20); taken += 4 << 20
except OSError as error: second = errno.errorcode[error.errno]
os.close(held.pop()); os.close(held.pop())  # some room for the CLI: it keeps what a tool prints in a file
print("stopped", first, number, second, taken >> 20, flush=True)
time.sleep(600)' > /tmp/took 2>&1 < /dev/null &
until test -s /tmp/took; do sleep 0.2; done; cat /tmp/took
""".strip()
KEEPS = "head -c 24M /dev/urandom > kept && sync kept && cat kept | sha256sum && sha256sum < kept"

HELD = ["no way to the host", "no way to the server", "hog killed", "bomb over", "file cut"]


@pytest.mark.timeout(600)
async def test_a_guest_takes_an_identity_enrols_runs_a_turn_and_ends(
    guest_image: Image, simulator: RunningSimulator, tmp_path: Path
) -> None:
    async with stand_in_gateway(simulator.url) as gateway:
        port = urlsplit(gateway.url).port
        assert port is not None
        async with booted(guest_image, tmp_path / "vm", port) as guest, aiohttp.ClientSession() as client:
            guest.say(b"nonsense\n")
            assert "control message" in (await guest.hear("refused"))["message"]
            guest.say(message("identity", agent_id=AGENT))
            assert "identity.hostname" in (await guest.hear("refused"))["message"]
            assert gateway.enrolments == []

            guest.say(identity(AGENT, gateway.secret, CLI_START_TIMEOUT="120").line())
            assert (await guest.hear("identified"))["agent_id"] == AGENT
            assert (await guest.hear("ready"))["agent_id"] == AGENT
            assert [enrolment.agent_id for enrolment in gateway.enrolments] == [AGENT]
            guest.say(identity("agent-ffffffffffffffff", gateway.secret).line())
            assert "already" in (await guest.hear("refused"))["message"]

            said = await _run_inside(client, guest.url, gateway, INSIDE)
            _check_inside(said, gateway)
            said = await _run_inside(client, guest.url, gateway, HOSTILE.format(port=port), may_fail=True)
            # the bomb may take the session's own CLI along, and nothing else
            assert not said or [line for line in said.splitlines() if not line.startswith("/bin/bash:")] == HELD, said
            assert (await _run_inside(client, guest.url, gateway, "echo still here")).strip() == "still here"
            await _check_disk(client, guest.url, gateway)

            guest.say(message("shutdown", grace=60))
            assert (await guest.hear("exited"))["status"] == 0
            async with asyncio.timeout(60):
                assert await guest.process.wait() == 0
            assert gateway.secret not in guest.console()
            assert "agent.enrolled" in (guest.folder / "log").read_text()


async def _check_disk(client: aiohttp.ClientSession, url: str, gateway: StandInGateway) -> None:
    """A session takes all that it can by files without a name; its neighbours' disk is not in it."""
    async with client.get(f"{url}/health") as answer:
        assert (await answer.json())["session_disk"].startswith("exact: each session's user has a quota"), answer
    limit = SCRATCH_MB // 4
    said = (await _run_inside(client, url, gateway, TAKES)).split()  # and what it took is held from now on
    assert (said[0], said[1], said[3]) == ("stopped", "EDQUOT", "EDQUOT"), said
    assert limit * 0.8 <= int(said[4]) <= limit, said
    one, other = (await _run_inside(client, url, gateway, KEEPS)).split(" -\n")[:2]
    assert len(one.strip()) == 64
    assert one.strip() == other.strip().removesuffix("-").strip()


async def _run_inside(
    client: aiohttp.ClientSession, url: str, gateway: StandInGateway, script: str, *, may_fail: bool = False
) -> str:
    """Run a script by the CLI's shell tool in the guest; return what it printed."""
    body: dict[str, Any] = turn(tool("Bash", command=script), timeout=240, stream=True)
    headers = {"authorization": f"Bearer {gateway.bearer}"}
    async with client.post(f"{url}/v1/agent/chat", json=body, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        said: str = ""
        data: dict[str, Any] = {}
        async for raw in answer.content:
            if raw.startswith(b"data: "):
                data = json.loads(raw[6:])
                if "tool_use_id" in data and "content" in data:
                    said = data["content"] if isinstance(data["content"], str) else json.dumps(data["content"])
        assert said or may_fail, f"the tool gave no result: {data}"
        return said


def _check_inside(said: str, gateway: StandInGateway) -> None:
    lines = said.splitlines()
    assert int(lines[0]) >= 10_000, said
    assert lines[1].startswith("git version"), said
    assert lines[2].startswith("ripgrep"), said
    assert "Claude Code" in lines[3], said
    assert "Read-only file system" in lines[4], said
    assert lines[5].split() == ["CapEff:", "0000000000000000"], said
    assert lines[6].split() == ["NoNewPrivs:", "1"], said
    assert lines[7] == "ext2/ext3", said
    assert lines[8].endswith("cloud-amd64"), said
    assert abs(int(lines[9]) - time.time()) < 120, said
    assert {"null", "urandom"} <= set(lines[10].split()), said
    assert not any(name.startswith(("v", "tty")) for name in lines[10].split()), said
    assert gateway.secret not in said
    assert "unshare failed" in lines[12], said
    assert len(lines) == 13, f"programs that run as another user are left: {lines[13:]}"


def test_the_probe_boots_the_real_kernel(guest_image: Image) -> None:
    """Under TCG, which always works: what the probe waits for does come."""
    found = probe(guest_image, kind="tcg", seconds=60)
    assert found.reason.startswith("the probe booted"), found


def test_the_images_files_are_those_of_its_manifest(guest_image: Image) -> None:
    assert verify(guest_image) == []
    manifest = guest_image.manifest()
    assert {"git", "ripgrep", "python3", "busybox-static"} <= set(manifest["packages"])
    assert manifest["kernel"].startswith("linux-image-")
