"""Agents killed with SIGKILL at random moments of a conversation with tools: no acknowledged turn or file is lost.

Runs real agent processes, the real Agent SDK and Claude CLI, and a stand-in gateway that stores transcripts and
workspaces. Ten kills by default; `AGENT_KILLS=100` for more. The moments come from a fixed seed, which a failure names.
"""

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hypercore_agents.agent.isolation.processes import kill_session
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.api.ids import new_session_id
from support.agent_process import AgentProcess, agent_process
from support.agent_server import StandInGateway, stand_in_gateway, tool, turn
from support.simulator_fixtures import RunningSimulator

KILLS = int(os.environ.get("AGENT_KILLS", "10"))
SEED = int(os.environ.get("AGENT_KILLS_SEED", "4"))


@dataclass
class Client:
    """One session, and the turns and files that were acknowledged to its client."""

    session_id: str = field(default_factory=new_session_id)
    generation: int = 0
    turns: int = 0
    words: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    cut: int = 0

    def next(self, more: str = "") -> tuple[str, dict[str, Any]]:
        """Return the next turn's word and request."""
        self.turns += 1
        word = f"word-{self.turns}-end"
        written = tool("Write", file_path=f"{word}.txt", content=f"content of {word}")
        prompt = f"{word} {written} {more}"
        return word, turn(prompt, self.session_id, number=self.turns, generation=self.generation, timeout=60)

    def acknowledged(self, word: str, answer: dict[str, Any]) -> None:
        if answer["durable"]:
            self.words.append(word)
        if answer["workspace_durable"]:
            self.files[f"{word}.txt"] = f"content of {word}"


@asynccontextmanager
async def restarted_agent(gateway: StandInGateway, folder: Path) -> AsyncIterator[AgentProcess]:
    gateway.enrolments.clear()
    folder.mkdir()
    async with agent_process(gateway, folder) as agent:
        try:
            await agent.until_ready()
            yield agent
        finally:
            if agent.process.returncode is None:
                agent.process.kill()
            await agent.process.wait()
            for left in (agent.state / "sessions").glob("*"):
                await asyncio.to_thread(kill_session, left, None)


@pytest.mark.timeout(120 + 30 * KILLS)
async def test_kills_lose_no_acknowledged_turn_or_file(simulator: RunningSimulator, tmp_path: Path) -> None:
    moments = random.Random(SEED)
    client = Client()
    async with stand_in_gateway(simulator.url) as gateway:
        for kill in range(KILLS + 1):
            client.generation += 1
            async with restarted_agent(gateway, tmp_path / str(kill)) as agent:
                word, body = client.next()
                status, answer = await agent.chat(body)
                assert status == 200, (SEED, kill, answer)
                if kill:
                    _check(client, simulator, agent, f"seed {SEED}, after kill {kill}")
                client.acknowledged(word, answer)
                word, body = client.next(moments.choice(("", "[[tokens 60]] [[rate 100]]")))
                request = asyncio.create_task(agent.chat(body))
                await asyncio.wait((request,), timeout=moments.uniform(0.0, 0.8))
                agent.process.kill()
                try:
                    status, answer = await request
                    if status == 200:
                        client.acknowledged(word, answer)
                except (aiohttp.ClientError, json.JSONDecodeError):
                    client.cut += 1
    assert client.cut > 0, "no kill came in the middle of a turn"
    assert len(client.words) > KILLS


def _check(client: Client, simulator: RunningSimulator, agent: AgentProcess, when: str) -> None:
    messages = json.dumps(simulator.requests(client.session_id)[-1]["body"]["messages"])
    positions = [messages.find(f"{word} ") for word in client.words]
    missing = [word for word, position in zip(client.words, positions, strict=True) if position < 0]
    assert not missing, f"{when}: turns that were acknowledged are missing: {missing}"
    assert positions == sorted(positions), f"{when}: turns are out of order"
    workspace = SessionFolder.of(agent.state, client.session_id).workspace
    present = {path.name: path.read_text() for path in workspace.glob("*.txt")}
    lost = [name for name, content in client.files.items() if present.get(name) != content]
    assert not lost, f"{when}: files that were acknowledged are missing: {lost}"
