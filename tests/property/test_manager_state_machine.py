"""A state machine of spawn, chat, kill, restart and delete: the manager always agrees with a simple model.

The manager is the real one, served over HTTP with a SQLite store; sandboxes are in memory, their agents are real
servers. After every step, the agents that the manager lists, those of the model and those that run are the same. The
manager also crashes (`support/manager_crashes.py`) at any moment of a spawn, a turn or a deletion; its successor has
only the store.

`MACHINE_EXAMPLES=100` runs more examples. `DEFECTS` shows what the machine can find: each of them, planted in the real
manager, must make it fail.
"""

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import pytest
from aiohttp import web
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from hypercore_agents.api.agents import AgentState
from hypercore_agents.compute.testing import MemoryBackend, MemoryHost
from hypercore_agents.manager import identity
from hypercore_agents.manager.composition import Manager
from hypercore_agents.security.sealing import KeyRing, Sealer
from hypercore_agents.store import agents as agent_rows
from hypercore_agents.store.database import Database
from hypercore_agents.store.schema import migrate
from support.manager_crashes import Life, OwnHost, Plant, cut_short
from support.manager_server import Agents, StandInAgent, completed, settings_for
from support.waiting import until

QUOTA = 3
USERS = ("ada", "bob")
LEASES_END = 20.0
"""Seconds after which all leases of a dead manager have expired."""
MOMENTS = st.none() | st.integers(0, 80)
"""When a manager crashes: after this many turns of the event loop; None: when the requested operation has begun."""


async def _thinking(agent: StandInAgent, _: web.Request, body: dict[str, Any]) -> web.Response:
    """A turn that takes a moment, during which a manager can crash."""
    await asyncio.sleep(0.01)
    return web.json_response(completed(agent, body))


class Platform(RuleBasedStateMachine):
    """Agents are (user, agent id), sessions (user, agent id, session id). `patience`: maximum seconds until manager and
    model agree."""

    patience: ClassVar[float] = 20.0
    agents = Bundle("agents")
    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, str] = {}
        self.turns: dict[str, int] = {}
        self.ahead = 0.0
        self.folder = Path(tempfile.mkdtemp(prefix="hypercore-machine-"))
        self.runner = asyncio.Runner()

    def plant(self, manager: Manager) -> None:
        """Modify a new manager."""

    @initialize()
    def begin(self) -> None:
        self.runner.run(self._begin())

    async def _begin(self) -> None:
        self.settings = settings_for(
            self.folder,
            max_agents_per_user=QUOTA,
            rate_limit_per_minute=0,
            rate_limit_per_hour=0,
            health_check_interval=1,
        )
        sealer = Sealer(KeyRing.load_or_create(self.settings.key_path))
        self.database = Database(self.settings.store_url)
        await migrate(self.database)
        self.machine = Agents(self.database, sealer)
        self.machine.prepare = lambda agent: setattr(agent, "answer", partial(_thinking, agent))
        self.host = MemoryHost()
        self.http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
        await self._manage()

    async def _manage(self) -> None:
        backend = OwnHost(MemoryBackend(self.host, serve=self.machine.serve, stop_serving=self.machine.cease))
        self.manager = Life(self.settings, backend, lambda: time.time() + self.ahead, self.plant)
        self.url = await self.manager.start()

    async def _crash(self) -> None:
        await self.manager.crash()
        self.ahead += LEASES_END
        await self._manage()

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
        """The agent's server dies, and its sandbox reports that it has exited."""
        _, agent_id = agent
        if self.live.pop(agent_id, None) is None:
            return
        self.host.exit(agent_id, -9)
        self.runner.run(until(lambda: self._has_state(agent_id, "failed"), seconds=self.patience))

    @rule(agent=agents)
    def delete(self, agent: tuple[str, str]) -> None:
        """Deletion is idempotent: deleting an ended agent succeeds and changes nothing."""
        _, agent_id = agent
        was_live = self.live.pop(agent_id, None) is not None
        status, answer = self.call("DELETE", "/v1/agents/delete", agent_id=agent_id)
        assert status == 200, answer
        assert answer["status"] == "stopped" if was_live else answer["status"] in ("stopped", "failed")

    @rule()
    def restart(self) -> None:
        async def again() -> None:
            await self.manager.stop()
            await self._manage()

        self.runner.run(again())

    @rule()
    def crash(self) -> None:
        self.runner.run(self._crash())

    @rule(target=agents, user=st.sampled_from(USERS), moment=MOMENTS)
    def crash_in_a_spawn(self, user: str, moment: int | None) -> MultipleResults[tuple[str, str]]:
        """An acknowledged agent exists, and every agent that exists comes to run, acknowledged or not."""
        had = {agent_id for agent_id, owner in self.live.items() if owner == user}
        sandboxes = set(self.host.sandboxes)
        answer = self.cut_short(
            "POST", "/v1/agents/spawn", {"user_id": user}, moment, lambda: set(self.host.sandboxes) != sandboxes
        )
        new = self.listed(user) - had
        if answer is not None and answer[0] == 200:
            assert new == {answer[1]["agent_id"]}
        assert len(new) <= (len(had) < QUOTA)
        self.live |= dict.fromkeys(new, user)
        return multiple(*((user, agent_id) for agent_id in new))

    @rule(session=sessions, moment=MOMENTS)
    def crash_in_a_turn(self, session: tuple[str, str, str], moment: int | None) -> None:
        """The session is usable at once, and an acknowledged turn counts."""
        user, agent_id, session_id = session
        if agent_id not in self.live or session_id not in self.turns:
            return
        body = {"user_id": user, "prompt": "more", "session_id": session_id}
        path = f"/agents/{agent_id}/v1/agent/chat"
        chats = self.machine.running[agent_id].chats
        asked = len(chats)
        answer = self.cut_short("POST", path, body, moment, lambda: len(chats) > asked)
        was = self.turns[session_id]
        status, after = self.call("POST", path, body)
        assert status == 200, after
        assert after["turn"] in ((was + 2,) if answer is not None and answer[0] == 200 else (was + 1, was + 2))
        self.turns[session_id] = after["turn"]

    @rule(agent=agents, moment=MOMENTS)
    def crash_in_a_delete(self, agent: tuple[str, str], moment: int | None) -> None:
        """An agent whose deletion was acknowledged is gone; otherwise the deletion can be repeated."""
        _, agent_id = agent
        path = f"/v1/agents/delete?agent_id={agent_id}"
        answer = self.cut_short("DELETE", path, None, moment, lambda: agent_id not in self.host.sandboxes)
        if answer is not None and answer[0] == 200:
            assert agent_id not in self.host.sandboxes
        self.live.pop(agent_id, None)
        status, deleted = self.call("DELETE", "/v1/agents/delete", agent_id=agent_id)
        assert status == 200, deleted

    def cut_short(
        self, method: str, path: str, body: Any, moment: int | None, begun: Callable[[], bool]
    ) -> tuple[int, Any] | None:
        """Send a request, crash the manager meanwhile, and start another one."""
        when = begun if moment is None else moment
        return self.runner.run(cut_short(self._call(method, path, body), when, self._crash))

    def listed(self, user: str) -> set[str]:
        status, found = self.call("GET", "/v1/agents/list", user_id=user)
        assert status == 200, found
        return {agent["agent_id"] for agent in found["agents"]}

    @invariant()
    def all_agree(self) -> None:
        if hasattr(self, "url"):
            self.runner.run(until(self._agree, seconds=self.patience))

    async def _agree(self) -> bool:
        if not set(self.host.sandboxes) == set(self.live) == set(self.machine.running):
            return False
        status, found = await self._call("GET", "/v1/agents/list")
        said = {agent["agent_id"]: (agent["user_id"], agent["status"]) for agent in found["agents"]}
        return status == 200 and said == {agent_id: (owner, "running") for agent_id, owner in self.live.items()}

    async def _has_state(self, agent_id: str, state: str) -> bool:
        status, found = await self._call("GET", "/v1/agents/get", agent_id=agent_id)
        return status == 200 and bool(found["status"] == state)

    def teardown(self) -> None:
        async def end() -> None:
            await self.manager.stop()
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
    max_examples=int(os.environ.get("MACHINE_EXAMPLES", "3")),
    stateful_step_count=14,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def does_not_confirm_stops(manager: Manager) -> None:
    """A reconciler that records a stop without confirming it."""

    async def stop(agent_id: str) -> None: ...

    manager.fleet._reconciler._stop_sandbox = stop  # type: ignore[method-assign]


def ignores_starts_of_other_managers(manager: Manager) -> None:
    """A reconciler that ignores starts that another process began."""
    real: Callable[[str], Awaitable[float | None]] = manager.fleet._reconciler.step
    born = manager.clock()

    async def step(agent_id: str) -> float | None:
        async with manager.database.read() as connection:
            row = await agent_rows.get_agent(connection, agent_id)
        if row is not None and row.created_at < born and row.state in (AgentState.PENDING, AgentState.STARTING):
            return None
        return await real(agent_id)

    manager.fleet._reconciler.step = step  # type: ignore[method-assign]


def never_releases_turns(manager: Manager) -> None:
    """A manager whose lease never expires, so that its turns are never released."""
    manager.identity.renew = lambda: _renew_without_expiry(manager)  # type: ignore[method-assign]


async def _renew_without_expiry(manager: Manager) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "LEASE_SECONDS", 1e9)
        await identity.ManagerIdentity.renew(manager.identity)


def spawns_and_deletes(machine: Platform) -> Iterator[None]:
    agent = machine.spawn(user="ada")
    yield
    machine.delete(agent=agent)
    yield


def crashes_in_spawns(machine: Platform) -> Iterator[None]:
    for moment in (None, *range(0, 80, 16)):
        found = machine.crash_in_a_spawn(user="ada", moment=moment)
        yield
        for agent in found.values:
            machine.delete(agent=agent)


def crashes_in_a_turn(machine: Platform) -> Iterator[None]:
    session = machine.chat(agent=machine.spawn(user="ada"))
    machine.crash_in_a_turn(session=session, moment=None)
    yield


DEFECTS = (
    (does_not_confirm_stops, spawns_and_deletes),
    (ignores_starts_of_other_managers, crashes_in_spawns),
    (never_releases_turns, crashes_in_a_turn),
)


@pytest.mark.parametrize(("defect", "path"), DEFECTS, ids=[defect.__name__ for defect, _ in DEFECTS])
def test_the_machine_finds_a_planted_defect(defect: Plant, path: Callable[[Platform], Iterator[None]]) -> None:
    """Applies the machine's rules in an order that finds the defect; a random order would find it only eventually."""

    class Broken(Platform):
        patience = 3.0

        def plant(self, manager: Manager) -> None:
            defect(manager)

    machine = Broken()
    try:
        machine.begin()
        with pytest.raises(AssertionError):
            walk(machine, path)
    finally:
        machine.teardown()


def walk(machine: Platform, path: Callable[[Platform], Iterator[None]]) -> None:
    """Follow a path, and compare with the model after every step."""
    for _ in path(machine):
        machine.all_agree()
