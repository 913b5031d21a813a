"""Agents killed -9 at random moments of a conversation with tools: nothing that was acknowledged is ever missing.

Real agent processes, the real Agent SDK and Claude CLI, a gateway's stand-in that keeps transcripts and workspaces. Ten
kills by default; `AGENT_KILLS=100` for more. The moments come from a fixed seed, told when the test fails.
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
from integration.test_agent_process import Running, agent_process, ready
from support.agent_server import StandInGateway, stand_in_gateway, tool, turn
from support.simulator_fixtures import RunningSimulator

KILLS = int(os.environ.get("AGENT_KILLS", "10"))
SEED = int(os.environ.get("AGENT_KILLS_SEED", "4"))


@dataclass
class Conversation:
    """One session, and what its client was promised."""

    session_id: str = field(default_factory=new_session_id)
    generation: int = 0
    turns: int = 0
    words: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    cut: int = 0

    def next(self, more: str = "") -> tuple[str, dict[str, Any]]:
        self.turns += 1
        word = f"word-{self.turns}-end"
        written = tool("Write", file_path=f"{word}.txt", content=f"content of {word}")
        prompt = f"{word} {written} {more}"
        return word, turn(prompt, self.session_id, number=self.turns, generation=self.generation, timeout=60)

    def promised(self, word: str, answer: dict[str, Any]) -> None:
        if answer["durable"]:
            self.words.append(word)
        if answer["workspace_durable"]:
            self.files[f"{word}.txt"] = f"content of {word}"


@asynccontextmanager
async def an_agent(gateway: StandInGateway, folder: Path) -> AsyncIterator[Running]:
    gateway.enrolments.clear()
    folder.mkdir()
    async with agent_process(gateway, folder) as agent:
        try:
            await ready(agent)
            yield agent
        finally:
            if agent.process.returncode is None:
                agent.process.kill()
            await agent.process.wait()
            for left in (agent.state / "sessions").glob("*"):
                await asyncio.to_thread(kill_session, left, None)


@pytest.mark.timeout(120 + 30 * KILLS)
async def test_nothing_that_was_acknowledged_is_missing_after_kills(
    simulator: RunningSimulator, tmp_path: Path
) -> None:
    moments = random.Random(SEED)
    talk = Conversation()
    async with stand_in_gateway(simulator.url) as gateway:
        for kill in range(KILLS + 1):
            talk.generation += 1
            async with an_agent(gateway, tmp_path / str(kill)) as agent:
                word, body = talk.next()
                status, answer = await agent.chat(body)
                assert status == 200, (SEED, kill, answer)
                if kill:
                    _check(talk, simulator, agent, f"seed {SEED}, after kill {kill}")
                talk.promised(word, answer)
                word, body = talk.next(moments.choice(("", "[[tokens 60]] [[rate 100]]")))
                asking = asyncio.create_task(agent.chat(body))
                await asyncio.wait((asking,), timeout=moments.uniform(0.0, 0.8))
                agent.process.kill()
                try:
                    status, answer = await asking
                    if status == 200:
                        talk.promised(word, answer)
                except (aiohttp.ClientError, json.JSONDecodeError):
                    talk.cut += 1
    assert talk.cut > 0, "no kill came in the middle of a turn"
    assert len(talk.words) > KILLS


def _check(talk: Conversation, simulator: RunningSimulator, agent: Running, when: str) -> None:
    said = json.dumps(simulator.requests(talk.session_id)[-1]["body"]["messages"])
    places = [said.find(f"{word} ") for word in talk.words]
    missing = [word for word, place in zip(talk.words, places, strict=True) if place < 0]
    assert not missing, f"{when}: turns that were acknowledged are missing: {missing}"
    assert places == sorted(places), f"{when}: turns are out of order"
    workspace = SessionFolder.of(agent.state, talk.session_id).workspace
    found = {path.name: path.read_text() for path in workspace.glob("*.txt")}
    lost = [name for name, content in talk.files.items() if found.get(name) != content]
    assert not lost, f"{when}: files that were acknowledged are missing: {lost}"
