"""The whole platform as `up --demo` runs it, for tests that kill parts of it: what runs, what is open, what is kept.

Everything is found from outside, in /proc and in the state folder, since what was killed cannot be asked.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from support.descriptors import descriptors
from support.folders_in_use import files_below
from support.ports import free_address
from support.waiting import until

ROLES = {
    "shim.py ": "shim",
    "hypercore_agents.manager.worker": "worker",
    "hypercore_agents manager": "manager",
    "hypercore_agents gateway": "gateway",
    "hypercore_agents autoscaler": "autoscaler",
    "hypercore_agents simulator": "simulator",
    "hypercore_agents.agent.launcher": "launcher",
    "hypercore_agents.agent": "agent",
    "hypercore_agents agent": "agent",
}
"""Which part of the platform a command line is, first match first. What else runs, Claude CLIs, comes and goes."""
_LISTENING, _CONNECTED = "0A", "01"


@dataclass(frozen=True)
class Counts:
    """What there is of the platform. `open` is what processes hold open, by role and kind."""

    processes: dict[str, int]
    files: dict[str, int]
    open: Counter[tuple[str, str]]

    def more_than(self, before: "Counts") -> dict[Any, Any]:
        """Return what differs from before, and what of it is open beyond what was; empty: nothing is left over.

        Fewer may be open: a process that was killed and started again has made fewer connections yet.
        """
        different = {
            name: (was, now)
            for name, was, now in (
                ("processes", before.processes, self.processes), ("files", before.files, self.files),
            )
            if was != now
        }  # fmt: skip
        beyond = {key: (before.open[key], count) for key, count in self.open.items() if count > before.open[key]}
        return {**different, **beyond}


class Up:
    """`up --demo` on a folder of its own; it can be killed and started again there."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.state = folder / "state"
        self.state.mkdir()
        names = ("LISTEN_ADDR", "GATEWAY_ADDR", "SIMULATOR_LISTEN", "AUTOSCALER_ADDR")
        self.addresses = {name: free_address() for name in names}
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "PYTHONPATH") if name in os.environ}
        self._environment = kept | self.addresses | {
            "STATE_DIR": str(self.state), "MIN_AGENTS": "1", "MAX_AGENTS": "1", "WORKER_COUNT": "2",
            "COMPUTE_BACKEND": "process", "RATE_LIMIT_PER_MINUTE": "0", "RATE_LIMIT_PER_HOUR": "0",
            "LOG_LEVEL": "WARNING", **variables,
        }  # fmt: skip
        self._log = folder / "log"
        self.process = self._start()

    @property
    def url(self) -> str:
        return f"http://{self.addresses['LISTEN_ADDR']}"

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "hypercore_agents", "up", "--demo"],
                env=self._environment, cwd=self.state.parent, stdout=log, stderr=log,
            )  # fmt: skip

    def again(self) -> None:
        """Start it once more, after it has ended."""
        self.process = self._start()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(120)
        shutil.rmtree(self.state, ignore_errors=True)

    def log(self) -> str:
        return self._log.read_text()[-4000:]


@contextlib.contextmanager
def up(folder: Path, **variables: str) -> Iterator[Up]:
    """Run it; it is over afterwards, and so is its state."""
    running = Up(folder, **variables)
    try:
        yield running
    finally:
        running.close()


@dataclass
class Platform:
    """What `up` runs, and how to ask it."""

    up: Up
    http: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return self.up.url

    async def call(self, method: str, path: str, body: Any = None, **params: str) -> tuple[int, Any]:
        """Ask; a connection that is cut is status 0."""
        try:
            async with self.http.request(method, self.url + path, json=body, params=params) as answer:
                return answer.status, await answer.json()
        except (aiohttp.ClientError, TimeoutError):
            return 0, None

    async def spawn(self, user_id: str = "ada") -> str:
        """Ask for an agent and do not wait for it."""
        body = {"user_id": user_id, "cores": 1, "memory": 1024}
        status, spawned = await self.call("POST", "/v1/agents/spawn", body, wait="false")
        assert status == 202, spawned
        return str(spawned["agent_id"])

    def processes(self) -> dict[int, str]:
        """Return command lines of all that belongs to this platform, by process id."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if not entry.name.isdigit() or int(entry.name) == os.getpid():
                    continue
                command = (entry / "cmdline").read_bytes()
                if str(self.up.state).encode() in command + (entry / "environ").read_bytes():
                    found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
        return {pid: command for pid, command in found.items() if command}

    def of_agent(self, agent_id: str) -> list[int]:
        """Return what runs in an agent's sandbox: its launcher, its server, its Claude CLIs."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f"AGENT_ID={agent_id}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return [pid for pid in found if pid not in self.shims().values()]

    def shims(self) -> dict[str, int]:
        """Return the process that watches over each sandbox, by agent."""
        return {
            command.rpartition("shim.py ")[2].split()[0]: pid
            for pid, command in self.processes().items()
            if "shim.py " in command
        }

    def kill(self, victim: str, agent_id: str) -> None:
        """Kill -9 every process of a role, or of an agent; one that has no process yet is not there to be killed."""
        if victim == "agent":
            doomed = self.of_agent(agent_id)
        else:
            doomed = [pid for pid, command in self.processes().items() if role(command) == victim]
        assert doomed or victim == "agent", self.processes()
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def settled(self) -> Counts:
        """Count once nothing changes any more."""
        found = [self.counts()]

        async def again() -> bool:
            await asyncio.sleep(0.2)
            found.append(self.counts())
            return found[-3:] == [found[-1]] * 3

        await until(again, seconds=60)
        return found[-1]

    def counts(self) -> Counts:
        """Count processes by role, files by name, and what is open by role and kind."""
        states = {
            line.split()[9]: line.split()[3]
            for table in ("tcp", "tcp6")
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        }
        roles: Counter[str] = Counter()
        held: Counter[tuple[str, str]] = Counter()
        for pid, command in self.processes().items():
            if part := role(command):
                roles[part] += 1
                held.update((part, kind) for kind in _open_in(pid, states) if kind)
        files = [str(path.relative_to(self.up.state)) for path in files_below(self.up.state)]
        # Metrics of dead workers are kept, SQLite makes and removes its own files; sessions' files are the pool's.
        kept = Counter(
            Path(name).name
            for name in files
            if not name.startswith("demo/metrics") and "/store.db" not in name and "/work/" not in name
        )
        return Counts(dict(roles), dict(kept), held)

    async def status(self, agent_id: str) -> str:
        """Return an agent's status, empty while the manager does not answer."""
        status, found = await self.call("GET", "/v1/agents/get", agent_id=agent_id)
        return str(found["status"]) if status == 200 else ""

    async def is_decided(self, agent_id: str) -> bool:
        """Say whether an agent runs or has failed."""
        return await self.status(agent_id) in ("running", "failed")

    async def agrees(self) -> bool:
        """Say whether the agents that the store calls running are those that run, and the pool is whole."""
        status, listed = await self.call("GET", "/v1/agents/list")
        status_too, stats = await self.call("GET", "/v1/agents/stats")
        if (status, status_too) != (200, 200):
            return False
        running = {agent["agent_id"] for agent in listed["agents"] if agent["status"] == "running"}
        if len(running) != listed["count"] or stats["pool"]["running"] != stats["pool"]["desired"]:
            return False
        return set(self.shims()) == running and all(self.of_agent(agent_id) for agent_id in running)

    async def takes_turns(self) -> bool:
        """Say whether the pool answers a chat."""
        status, answer = await self.call("POST", "/v1/agent/chat", {"user_id": "bob", "prompt": "hello"})
        if status != 200:
            return False
        return (await self.call("DELETE", f"/v1/agent/session/{answer['session_id']}"))[0] == 200


def role(command: str) -> str:
    """Return the part of the platform that a command line is, empty for what comes and goes."""
    return next((part for piece, part in ROLES.items() if piece in command), "")


def _open_in(pid: int, states: dict[str, str]) -> Iterator[str]:
    """Give the kind of each descriptor; of the store's files nothing: its pool of connections has bounds of its own."""
    with contextlib.suppress(OSError):
        for _, target in descriptors(pid):
            kind, _, inode = target.rstrip("]").partition(":[")
            state = states.get(inode) if kind == "socket" else None
            if state is not None:
                yield {_LISTENING: "listening", _CONNECTED: "connected"}.get(state, "closing")
            elif "/store.db" not in target:
                yield kind if ":" in target else "file"
