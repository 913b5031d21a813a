"""The platform with agents in microVMs: deployment, turns of a pool agent, hostile tools, a spawn, and removal.

The tests run `deploy-claude-agents.sh --demo --microvm` as a user would; the model is the simulator behind the gateway,
outside the VMs. One platform, one template and two VMs serve all checks, because the start of a CLI takes ten seconds
without KVM.
"""

import base64
import contextlib
import json
import mmap
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hypercore_agents.compute.microvm.image import Image
from hypercore_agents.compute.microvm.image.skills import hashes
from hypercore_agents.compute.testing.conformance import eventually
from support.agent_server import tool
from support.folders_in_use import entries_below
from support.microvm_backend import cannot_run
from support.ports import free_port

ROOT = Path(__file__).parents[2]
START_SECONDS = 400.0
SMALL = {"cores": 2, "memory": 1024}

HOSTILE = textwrap.dedent("""
    import os, socket, json, sys
    def connects(host, port):
        with socket.socket() as probe:
            probe.settimeout(2)
            try:
                probe.connect((host, int(port)))
            except OSError:
                return False
            return True
    def finds(*names):
        found = {name: [] for name in names}
        for place, folders, files in os.walk("/"):
            if place == "/":
                folders[:] = [name for name in folders if name not in ("proc", "sys", "usr")]
            for name in found.keys() & files:
                found[name].append(place)
        return found.values()
    def signals():
        found = []
        for pid in range(2, 4096):
            try:
                os.kill(pid, 0)
                found.append(pid)
            except OSError:
                pass
        return found
    def owner(pid):
        try:
            return os.stat(f"/proc/{pid}").st_uid
        except OSError:
            return os.getuid()
    def writes(path):
        try:
            open(path, "w").close()
        except OSError:
            return False
        return True
    open("mine.txt", "w").close()
    own, other = finds("mine.txt", "note.txt")
    print("FOUND " + json.dumps({
        "own": bool(own), "other": other,
        "gateway": connects("127.0.0.1", 8090),
        "open": [port for port in (8080, 9090, *sys.argv[2:]) if connects("127.0.0.1", port)],
        "host": [port for port in (8090, *sys.argv[2:]) if connects(sys.argv[1], port)],
        "signals": [pid for pid in signals() if owner(pid) != os.getuid()], "uid": os.getuid(),
        "writes": [path for path in ("/usr/x", "/etc/x", "/var/lib/agent/x", "/proc/sys/kernel/core_pattern",
            "/opt/hypercore-agents/skills/dialects/SKILL.md", "/dev/vda", "/dev/vport0p1", "/dev/vport1p1",
            "/dev/hvc0") if writes(path)],
    }))
""").strip()
"""The attempts of a session's tool in the guest; the arguments are the host's address and its ports."""


@dataclass
class Platform:
    """A platform started by `up` with microVMs."""

    ports: list[int]
    state: Path
    environment: dict[str, str]
    skills: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    def script(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(ROOT / "scripts/deploy-claude-agents.sh"), *arguments],
            env=self.environment, capture_output=True, text=True, timeout=START_SECONDS + 200, check=False,
        )  # fmt: skip

    def processes(self) -> list[str]:
        """Return the command lines of this platform's processes, including shims, template holders and QEMUs."""
        sandboxes = {entry.name for entry in self.state.glob("demo/microvm/sandboxes/*")}
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and int(entry.name) != os.getpid():
                    command = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                    text = command + (entry / "environ").read_bytes().decode(errors="replace")
                    if str(self.state) in text or any(name in command for name in sandboxes):
                        found.append(f"{entry.name} {command}")
        return found

    def running(self, what: str) -> list[int]:
        """Return the pids of this platform's processes whose command line contains a text."""
        return [int(entry.partition(" ")[0]) for entry in self.processes() if what in entry]

    def template_holds(self, *wanted: bytes) -> list[bytes]:
        """Return which of these occur in the template: in the holder's memory and state, or on its disk."""
        (description,) = self.state.glob("demo/microvm/templates/*/template.json")
        holder = json.loads(description.read_text())["holder"]["pid"]
        parts = [path for path in Path(f"/proc/{holder}/fd").iterdir() if str(path.readlink()).startswith("/memfd:")]
        assert len(parts) > 2  # the state, and blocks of memory
        found = set()
        for part in (*parts, description.with_name("scratch")):
            with part.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
                found |= {word for word in wanted if content.find(word) >= 0}
        return [word for word in wanted if word in found]

    def identified(self, agent_id: str) -> tuple[str, str, float]:
        """Return hostname, boot id and clock of an agent's VM when it got its identity, from `logs`."""
        command = [sys.executable, "-m", "hypercore_agents", "logs", agent_id, "--tail", "10000", "--url", self.url]
        shown = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout
        (found,) = re.findall(r"^guest: (\S+), boot (\S+), (\S+), identified\r?$", shown, re.MULTILINE)
        assert "agent.enrolled" in shown  # the server's log follows
        return found[0], found[1], datetime.fromisoformat(found[2]).timestamp()

    def enrolled(self) -> dict[str, str]:
        """Return the public keys of all agents that have enrolled."""
        with contextlib.closing(sqlite3.connect(next((self.state / "demo").glob("*.db")))) as store:
            rows = store.execute("select agent_id, public_key from enrolments where public_key is not null")
            return dict(rows.fetchall())


@pytest.fixture(scope="module")
def skills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operator's folder of skills, which the script's build adds to the image."""
    folder = tmp_path_factory.mktemp("skills")
    (folder / "dialects").mkdir()
    (folder / "dialects" / "SKILL.md").write_text("---\nname: dialects\ndescription: Speaks.\n---\nSay ahoy.\n")
    (folder / "dialects" / "words.txt").write_text("belay")
    return folder


@pytest.fixture(scope="module")
def images(guest_image: Image) -> Iterator[Path]:
    """A separate folder of images with the machine's layers; hard links to them need the same file system."""
    shared = guest_image.folder.parents[1]
    folder = Path(tempfile.mkdtemp(prefix="test-", dir=shared))
    (folder / "layers").symlink_to(shared / "layers")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def platform(images: Path, skills: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    lacking = cannot_run()
    if lacking:
        pytest.skip(lacking)
    ports = [free_port() for _ in range(4)]
    names = ("LISTEN_ADDR", "GATEWAY_ADDR", "SIMULATOR_LISTEN", "AUTOSCALER_ADDR")
    state = tmp_path_factory.mktemp("platform") / "state"
    environment = {
        **{name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")},
        **{name: f"127.0.0.1:{port}" for name, port in zip(names, ports, strict=True)},
        "STATE_DIR": str(state),
        "HYPERCORE_IMAGE_DIR": str(images),
        "SKILLS_DIR": str(skills),
        "HYPERCORE_VENV": str(Path(sys.executable).parents[1]),
        "MIN_AGENTS": "1",
        "MAX_AGENTS": "1",
        "POOL_CONFIG": json.dumps(SMALL),
        "START_TIMEOUT": str(START_SECONDS),
        "REQUEST_TIMEOUT": "300",
        "SCRATCH_MB": "512",
        # enough for two agents of two cores, not for a third
        "CPU_OVERCOMMIT": str(5.5 / len(os.sched_getaffinity(0))),
    }
    platform = Platform(ports, state, environment, skills)
    started = platform.script("--demo", "--microvm")
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        assert "agents run in microVMs: " in started.stderr
        assert "adding skills: dialects" in started.stderr
        assert "skills in SKILLS_DIR are not" not in started.stderr
        yield platform
    finally:
        stopped = platform.script("--stop", "--purge")
    assert stopped.returncode == 0, stopped.stderr
    assert "nothing runs" in stopped.stderr
    assert not state.exists()
    assert platform.processes() == []


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=START_SECONDS)) as client:
        yield client


async def post(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    async with http.post(url, json=body) as answer:
        return answer.status, await answer.json()


async def turn(http: aiohttp.ClientSession, platform: Platform, **body: Any) -> dict[str, Any]:
    """Chat with the pool; retry a retryable error, because a CLI under TCG may be too slow on a busy machine."""
    for _ in range(3):
        status, told = await post(http, f"{platform.url}/v1/agent/chat", body)
        if status == 200 or not told["error"]["retryable"]:
            break
    assert status == 200, told
    assert told["status"] == "completed", told
    return told


async def manager_restarts(http: aiohttp.ClientSession, platform: Platform, killed: int) -> None:
    """Wait until a manager other than the killed one answers."""

    async def back() -> bool:
        if not set(platform.running("hypercore_agents manager")) - {killed}:
            return False
        with contextlib.suppress(aiohttp.ClientError):
            async with http.get(f"{platform.url}/ready") as answer:
                return answer.status == 200
        return False

    await eventually(back, seconds=60)


@pytest.mark.timeout(900)
async def test_tools_of_a_pool_agents_sessions_cannot_leave_its_microvm(
    platform: Platform, images: Path, http: aiohttp.ClientSession
) -> None:
    chat = f"{platform.url}/v1/agent/chat"
    async with http.get(f"{platform.url}/v1/agents/list") as answer:
        (agent,) = (await answer.json())["agents"]
    assert agent["status"] == "running"
    # The image has exactly the operator's skills, each with its hash.
    (manifest,) = (json.loads(path.read_text()) for path in images.glob("images/*/manifest.json"))
    assert manifest["skills"] == hashes(platform.skills)
    status, refused = await post(http, chat, {"user_id": "ada", "prompt": "hello", "skills": ["poetry"]})
    assert status == 400
    assert "the skill 'poetry' does not exist; skills of this agent: dialects" in refused["error"]["message"]
    write = tool("Bash", command="echo from-the-guest > note.txt; uname -r; cat /opt/hypercore-agents/skills/*/*.txt")
    prompt = write + tool("Skill", skill="dialects")
    told = await turn(http, platform, user_id="ada", prompt=prompt, skills=["dialects"])
    asked = f"http://127.0.0.1:{platform.ports[2]}/simulator/requests?session_id={told['session_id']}"
    async with http.get(asked) as answer:
        heard = json.dumps(await answer.json())
    assert "Say ahoy." in heard  # the CLI in the guest gave the skill to the model
    assert "belay" in heard  # and a tool reads the files beside it
    assert "cloud-amd64" in heard
    assert os.uname().release not in heard  # another kernel
    assert not [path for path in entries_below(platform.state) if path.name == "note.txt"]
    read = tool("Bash", command="cat note.txt; id -u")
    body = {"user_id": "ada", "session_id": told["session_id"], "prompt": read, "stream": True}
    async with http.post(chat, json=body) as answer:
        events = (await answer.read()).decode()
    assert "from-the-guest" in events

    # A hostile session of another user in the same VM.
    with socket.create_server(("127.0.0.1", 0)) as other:
        ports = [*map(str, (*platform.ports, other.getsockname()[1]))]
        encoded = base64.b64encode(HOSTILE.encode()).decode()
        attack = f"echo {encoded} | base64 -d > x.py && python3 x.py 10.0.77.1 {' '.join(ports)}"
        told = await turn(http, platform, user_id="bob", prompt=tool("Bash", command=attack))
    assert "FOUND " in told["content"], told
    found, _ = json.JSONDecoder().raw_decode(told["content"].partition("FOUND ")[2].replace('\\"', '"'))
    controls = (found.pop("own"), found.pop("gateway"))
    assert controls == (True, True), found  # the probes work: they find its own file and reach the gateway
    assert found.pop("uid") not in (0, 1000)
    assert found == {"other": [], "open": [], "host": [], "signals": [], "writes": []}


@pytest.mark.timeout(900)
async def test_a_clone_has_its_own_identity(platform: Platform, http: aiohttp.ClientSession) -> None:
    small = {"user_id": "ada", **SMALL, "timeout": 300}
    status, refused = await post(http, f"{platform.url}/v1/agents/spawn", {**small, "memory": 256})
    assert status == 400
    assert "memory: a virtual machine needs at least 512 MB" in refused["error"]["message"]
    status, refused = await post(http, f"{platform.url}/v1/agents/spawn", {**small, "gpu_quota": 1024})
    assert status == 400
    assert "gpu_quota: the microvm backend has no GPUs" in refused["error"]["message"]

    before = time.time()
    status, agent = await post(http, f"{platform.url}/v1/agents/spawn", small)
    assert status == 200, agent
    async with http.get(f"{platform.url}/v1/agents/list") as answer:
        (other,) = {entry["agent_id"] for entry in (await answer.json())["agents"]} - {agent["agent_id"]}
    name, boot, clock = platform.identified(agent["agent_id"])
    other_name, other_boot, other_clock = platform.identified(other)
    assert (name, other_name) == (agent["agent_id"], other)
    assert boot != other_boot
    # The snapshot was taken before the other agent's turns, so the clock must have been set since.
    assert other_clock < before - 5
    assert before - 2 <= clock <= time.time() + 2
    keys = platform.enrolled()
    assert agent["agent_id"] in keys
    assert len(keys) >= 2  # the pool's agent is another clone of the same template
    assert len({*keys.values()}) == len(keys)
    async with http.get(f"{platform.url}/v1/agents/stats") as answer:
        host = (await answer.json())["host"]
    assert (host["cores_used"], host["disk_used_mb"]) == (4, 1024)

    # The template has no identity, secret or text of a session; the control is a message of a waiting guest.
    ids = [entry.encode() for entry in (agent["agent_id"], other)]
    secrets = [b"the-simulator-needs-no-key", b"from-the-guest", *ids]
    assert platform.template_holds(b"waiting-for-identity", *secrets) == [b"waiting-for-identity"]

    # A spawn that does not fit is refused with the numbers.
    status, refused = await post(http, f"{platform.url}/v1/agents/spawn", small)
    assert (status, refused["error"]["type"]) == (503, "at_capacity")
    assert re.search(r"cannot hold 2 more cores and 1280 MB: 1 of 5 cores and \d+ of", refused["error"]["message"]), (
        refused
    )

    # A restarted manager finds both agents unchanged.
    shims = platform.running("microvm.shim")
    assert len(shims) == 2
    (manager,) = platform.running("hypercore_agents manager")
    os.kill(manager, signal.SIGKILL)
    await manager_restarts(http, platform, manager)

    async def only_both() -> bool:  # the refused spawn may not have been removed yet when the manager died
        async with http.get(f"{platform.url}/v1/agents/list") as answer:
            found = {entry["agent_id"]: entry["status"] for entry in (await answer.json())["agents"]}
        assert (found[name], found[other]) == ("running", "running")
        return len(found) == 2

    await eventually(only_both, seconds=60)
    async with http.get(f"{platform.url}/agents/{name}/health") as answer:
        assert answer.status == 200, await answer.text()
    assert platform.running("microvm.shim") == shims

    async with http.delete(f"{platform.url}/v1/agents/delete?agent_id={agent['agent_id']}") as answer:
        assert answer.status == 200
    assert len(platform.running("microvm.shim")) == 1
    assert len(list(platform.state.rglob("microvm/sandboxes/*"))) == 1
