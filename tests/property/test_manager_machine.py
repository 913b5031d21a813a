"""A state machine over spawn, chat, kill, restart and delete: what the manager says is what a simple model says.

The manager is the real one, served over HTTP on a SQLite store; sandboxes are in memory, their agents real servers.
After every step the agents that the manager lists, those that the model has and those that run are the same.
"""

import asyncio
import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from hypercore_agents.compute.testing import FaultBackend, MemoryBackend, MemoryHost
from hypercore_agents.security.sealing import KeyRing, Sealer
from hypercore_agents.store.database import Database
from hypercore_agents.store.schema import migrate
from manager_sides import Agents, managing, settings_for, until

QUOTA = 3
USERS = ("ada", "bob")


class Platform(RuleBasedStateMachine):
    """Agents are (user, agent id), sessions (user, agent id, session id)."""

    agents = Bundle("agents")
    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, str] = {}
        self.turns: dict[str, int] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="hypercore-machine-"))
        self.runner = asyncio.Runner()

    @initialize()
    def begin(self) -> None:
        self.runner.run(self._begin())

    async def _begin(self) -> None:
        self.settings = settings_for(self.folder, max_agents_per_user=QUOTA, rate_limit_per_minute=0)
        sealer = Sealer(KeyRing.load_or_create(self.settings.key_path))
        self.database = Database(self.settings.store_url)
        await migrate(self.database)
        self.machine = Agents(self.database, sealer)
        self.host = MemoryHost()
        self.http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
        await self._manage()

    async def _manage(self) -> None:
        backend = FaultBackend(MemoryBackend(self.host, serve=self.machine.serve, cease=self.machine.cease))
        self.manager = contextlib.AsyncExitStack()
        self.url = await self.manager.enter_async_context(managing(self.settings, backend))

    def call(self, method: str, path: str, body: Any = None, **params: str) -> tuple[int, Any]:
        return self.runner.run(self._call(method, path, body, **params))

    async def _call(self, method: str, path: str, body: Any = None, **params: str) -> tuple[int, Any]:
        async with self.http.request(method, self.url + path, json=body, params=params) as answer:
            return answer.status, await answer.json()

    @rule(target=agents, user=st.sampled_from(USERS))
    def spawn(self, user: str) -> Any:
        status, answer = self.call("POST", "/v1/agents/spawn", {"user_id": user})
        if list(self.live.values()).count(user) >= QUOTA:
            assert (status, answer["error"]["type"]) == (429, "rate_limited"), answer
            return multiple()
        assert status == 200, answer
        self.live[answer["agent_id"]] = user
        return (user, answer["agent_id"])

    @rule(target=sessions, agent=agents)
    def chat(self, agent: tuple[str, str]) -> Any:
        user, agent_id = agent
        status, answer = self.call("POST", f"/agents/{agent_id}/v1/agent/chat", {"user_id": user, "prompt": "hi"})
        if agent_id not in self.live:
            assert status == 404, answer
            return multiple()
        assert (status, answer["turn"]) == (200, 1), answer
        self.turns[answer["session_id"]] = 1
        return (user, agent_id, answer["session_id"])

    @rule(session=sessions, foreign=st.booleans())
    def go_on(self, session: tuple[str, str, str], foreign: bool) -> None:
        user, agent_id, session_id = session
        asks = next(other for other in USERS if other != user) if foreign else user
        body = {"user_id": asks, "prompt": "more", "session_id": session_id}
        status, answer = self.call("POST", f"/agents/{agent_id}/v1/agent/chat", body)
        if foreign or agent_id not in self.live or session_id not in self.turns:
            assert (status, answer["error"]["type"]) == (404, "not_found"), answer
            return
        self.turns[session_id] += 1
        assert (status, answer["turn"]) == (200, self.turns[session_id]), answer

    @rule(session=consumes(sessions))
    def delete_session(self, session: tuple[str, str, str]) -> None:
        user, agent_id, session_id = session
        status, answer = self.call("DELETE", f"/v1/agent/session/{session_id}", user_id=user)
        assert status == (200 if agent_id in self.live else 404), answer
        self.turns.pop(session_id)

    @rule(agent=agents)
    def kill(self, agent: tuple[str, str]) -> None:
        """The agent's server dies, and its sandbox says so."""
        _, agent_id = agent
        if self.live.pop(agent_id, None) is None:
            return
        self.host.exit(agent_id, -9)
        self.runner.run(until(lambda: self._has_state(agent_id, "failed"), seconds=30))

    @rule(agent=agents)
    def delete(self, agent: tuple[str, str]) -> None:
        """Deleting is idempotent: also an agent that is over is deleted with success, and stays what it was."""
        _, agent_id = agent
        was_live = self.live.pop(agent_id, None) is not None
        status, answer = self.call("DELETE", "/v1/agents/delete", agent_id=agent_id)
        assert status == 200, answer
        assert answer["status"] == "stopped" if was_live else answer["status"] in ("stopped", "failed")

    @rule()
    def restart(self) -> None:
        async def again() -> None:
            await self.manager.aclose()
            await self._manage()

        self.runner.run(again())

    @invariant()
    def all_agree(self) -> None:
        if not hasattr(self, "url"):
            return
        for user in USERS:
            status, listed = self.call("GET", "/v1/agents/list", user_id=user)
            assert status == 200, listed
            mine = {agent_id for agent_id, owner in self.live.items() if owner == user}
            assert {agent["agent_id"] for agent in listed["agents"]} == mine
            assert {agent["status"] for agent in listed["agents"]} <= {"running"}
        self.runner.run(until(lambda: set(self.host.sandboxes) == set(self.live) == set(self.machine.running)))

    async def _has_state(self, agent_id: str, state: str) -> bool:
        status, found = await self._call("GET", "/v1/agents/get", agent_id=agent_id)
        return status == 200 and bool(found["status"] == state)

    def teardown(self) -> None:
        async def end() -> None:
            await self.manager.aclose()
            await self.machine.close()
            await self.database.close()
            await self.http.close()

        try:
            if hasattr(self, "manager"):
                self.runner.run(end())
        finally:
            self.runner.close()
            shutil.rmtree(self.folder, ignore_errors=True)


TestPlatform = Platform.TestCase
TestPlatform.settings = settings(
    max_examples=5,
    stateful_step_count=20,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
