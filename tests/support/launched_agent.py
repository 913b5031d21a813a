"""Fixtures: a launcher, and an agent whose sessions it isolates, shared by the tests of a module.

A module overrides `launcher_options` and `agent_settings` to change them, and names the agent's fixture `agent` with
`agent = launched_agent`.
"""

import base64
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hypercore_agents.agent.launcher.client import LauncherClient
from support.agent_server import FIRST_USER, Agent, launched, served_agent, stand_in_gateway, tool, turn
from support.simulator_fixtures import RunningSimulator


@dataclass(frozen=True)
class LauncherOptions:
    """The parameters of `launched`. Launchers that run at the same time need different users."""

    arguments: tuple[str, ...] = ()
    first: int = FIRST_USER
    users: int = 5_000
    skills: Path | None = None


@pytest.fixture(scope="module")
def launcher_options() -> LauncherOptions:
    """Return the launcher's options; to be overridden."""
    return LauncherOptions()


@pytest.fixture(scope="module")
def agent_settings() -> dict[str, Any]:
    """Return the agent's settings besides the defaults; to be overridden."""
    return {}


@pytest.fixture(scope="module")
def launcher_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the state folder of launcher and agent."""
    return tmp_path_factory.mktemp("agent") / "state"


@pytest.fixture(scope="module")
def launcher(launcher_state: Path, launcher_options: LauncherOptions) -> Iterator[LauncherClient]:
    """Run a launcher."""
    options = launcher_options
    with launched(
        launcher_state, *options.arguments, users=options.users, first=options.first, skills=options.skills
    ) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def launched_agent(
    simulator_process: RunningSimulator, launcher_state: Path, launcher: LauncherClient, agent_settings: dict[str, Any]
) -> AsyncIterator[Agent]:
    """Serve an agent with the launcher, and a stand-in gateway that relays to the simulator."""
    async with (
        stand_in_gateway(simulator_process.url) as gateway,
        served_agent(gateway, launcher_state, launcher, **agent_settings) as agent,
    ):
        yield agent


async def run_bash(
    agent: Agent, script: str, session_id: str | None = None, *, number: int = 1, **options: Any
) -> dict[str, Any]:
    """Run a turn in which the model calls Bash; return its answer, which must be a success."""
    return await agent.chat(turn(tool("Bash", command=script), session_id, number=number, timeout=60, **options))


def python_command(script: str, *arguments: object) -> str:
    """Return a shell command that runs a Python script, whatever characters it has."""
    encoded = base64.b64encode(script.encode()).decode()
    return f'python3 -c "$(echo {encoded} | base64 -d)" {" ".join(map(str, arguments))}'.rstrip()
