"""The whole platform under `up --demo`, for tests that kill parts of it: processes, open descriptors and files.

Everything is read from outside, in /proc and the state folder, because a killed process cannot report.
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
"""Roles by part of a command line; the first match counts. Other processes (Claude CLIs) are not counted."""
_LISTENING, _CONNECTED = "0A", "01"


@dataclass(frozen=True)
class Counts:
    """Counts of the platform's processes and files. `open` counts open descriptors by role and kind."""

    processes: dict[str, int]
    files: dict[str, int]
    open: Counter[tuple[str, str]]

    def more_than(self, before: "Counts") -> dict[Any, Any]:
        """Return differences in processes and files, and additional open descriptors; empty if nothing leaked.

        Fewer descriptors are no difference: a restarted process may have opened fewer connections so far.
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
    """`up --demo` with its own folder, in which it can be killed and restarted."""

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
        """Restart it after it has ended."""
        self.process = self._start()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(120)
        shutil.rmtree(self.state, ignore_errors=True)

    def log(self) -> str:
        return self._log.read_text()[-4000:]


@contextlib.contextmanager
def up(folder: Path, **variables: str) -> Iterator[Up]:
    """Run `up`; stop it and delete its state afterwards."""
    running = Up(folder, **variables)
    try:
        yield running
    finally:
        running.close()


@dataclass
class Platform:
    """A running `up` and an HTTP client for it."""

    up: Up
    http: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return self.up.url

    async def call(self, method: str, path: str, body: Any = None, **params: str) -> tuple[int, Any]:
        """Send a request; a lost connection is status 0."""
        try:
            async with self.http.request(method, self.url + path, json=body, params=params) as answer:
                return answer.status, await answer.json()
        except (aiohttp.ClientError, TimeoutError):
            return 0, None

    async def spawn(self, user_id: str = "ada") -> str:
        """Spawn an agent without waiting for it."""
        body = {"user_id": user_id, "cores": 1, "memory": 1024}
        status, spawned = await self.call("POST", "/v1/agents/spawn", body, wait="false")
        assert status == 202, spawned
        return str(spawned["agent_id"])

    def processes(self) -> dict[int, str]:
        """Return the command lines of the platform's processes, by process id."""
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
        """Return the process ids in an agent's sandbox: launcher, server and Claude CLIs."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f"AGENT_ID={agent_id}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return [pid for pid in found if pid not in self.shims().values()]

    def shims(self) -> dict[str, int]:
        """Return the process id of each agent's shim."""
        return {
            command.rpartition("shim.py ")[2].split()[0]: pid
            for pid, command in self.processes().items()
            if "shim.py " in command
        }

    def kill(self, victim: str, agent_id: str) -> None:
        """Kill -9 every process of a role or of an agent; an agent may have no process yet."""
        if victim == "agent":
            victims = self.of_agent(agent_id)
        else:
            victims = [pid for pid, command in self.processes().items() if role(command) == victim]
        assert victims or victim == "agent", self.processes()
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def settled(self) -> Counts:
        """Return the counts once they are stable."""
        found = [self.counts()]

        async def again() -> bool:
            await asyncio.sleep(0.2)
            found.append(self.counts())
            return found[-3:] == [found[-1]] * 3

        await until(again, seconds=60)
        return found[-1]

    def counts(self) -> Counts:
        """Count processes by role, files by name, and open descriptors by role and kind."""
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
        # Without metrics of dead workers, files that SQLite creates and removes, and files of sessions.
        counted = Counter(
            Path(name).name
            for name in files
            if not name.startswith("demo/metrics") and "/store.db" not in name and "/work/" not in name
        )
        return Counts(dict(roles), dict(counted), held)

    async def status(self, agent_id: str) -> str:
        """Return an agent's status, empty while the manager does not answer."""
        status, found = await self.call("GET", "/v1/agents/get", agent_id=agent_id)
        return str(found["status"]) if status == 200 else ""

    async def is_decided(self, agent_id: str) -> bool:
        """Return whether an agent is running or failed."""
        return await self.status(agent_id) in ("running", "failed")

    async def agrees(self) -> bool:
        """Return whether the running agents in the store match the processes and the pool has its desired size."""
        status, listed = await self.call("GET", "/v1/agents/list")
        status_too, stats = await self.call("GET", "/v1/agents/stats")
        if (status, status_too) != (200, 200):
            return False
        running = {agent["agent_id"] for agent in listed["agents"] if agent["status"] == "running"}
        if len(running) != listed["count"] or stats["pool"]["running"] != stats["pool"]["desired"]:
            return False
        return set(self.shims()) == running and all(self.of_agent(agent_id) for agent_id in running)

    async def takes_turns(self) -> bool:
        """Return whether the pool answers a chat."""
        status, answer = await self.call("POST", "/v1/agent/chat", {"user_id": "bob", "prompt": "hello"})
        if status != 200:
            return False
        return (await self.call("DELETE", f"/v1/agent/session/{answer['session_id']}"))[0] == 200


def role(command: str) -> str:
    """Return the role of a command line; empty for other processes."""
    return next((part for piece, part in ROLES.items() if piece in command), "")


def _open_in(pid: int, states: dict[str, str]) -> Iterator[str]:
    """Yield the kind of each descriptor, except the store's files, whose connection pool is bounded separately."""
    with contextlib.suppress(OSError):
        for _, target in descriptors(pid):
            kind, _, inode = target.rstrip("]").partition(":[")
            state = states.get(inode) if kind == "socket" else None
            if state is not None:
                yield {_LISTENING: "listening", _CONNECTED: "connected"}.get(state, "closing")
            elif "/store.db" not in target:
                yield kind if ":" in target else "file"
