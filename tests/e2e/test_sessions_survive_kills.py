"""Random kills of agents during scripted conversations: no acknowledged turn and no durable file is ever missing.

The whole platform with the real CLI. Conversations write a file in every turn; meanwhile agents are killed -9, between
and during turns. Everything acknowledged as durable must exist afterwards, on any agent.

`KILLS=100 pytest tests/e2e/test_sessions_survive_kills.py` kills more often; `KILLS_SEED` repeats a run.
`tests/faults/test_agent_kills.py` checks what a single killed agent retains; here the whole platform moves sessions.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from support.ports import free_port

KILLS = int(os.environ.get("KILLS", "3"))
SEED = int(os.environ.get("KILLS_SEED", "20261125"))
USERS, AGENTS = 3, 3
pytestmark = [pytest.mark.timeout(300 + 60 * KILLS)]


@dataclass
class Site:
    url: str
    simulator: str
    http: aiohttp.ClientSession

    async def chat(self, user_id: str, prompt: str, session_id: str | None) -> tuple[int, dict[str, Any]]:
        body = {"user_id": user_id, "prompt": prompt} | ({"session_id": session_id} if session_id else {})
        async with self.http.post(f"{self.url}/v1/agent/chat", json=body) as answer:
            found = json.loads(await answer.text())
            return answer.status, found

    async def stats(self) -> dict[str, Any]:
        async with self.http.get(f"{self.url}/v1/agents/stats") as answer:
            found: dict[str, Any] = await answer.json()
            return found

    def kill(self, agent_id: str) -> int:
        """Kill every process of this agent; return their number."""
        killed = 0
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f"AGENT_ID={agent_id}\0".encode() in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
                    killed += 1
        return killed


@dataclass
class Conversation:
    """One user's session and its acknowledged turns and files."""

    user_id: str
    session_id: str | None = None
    agent_id: str = ""
    words: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    maybe: list[str] = field(default_factory=list)
    moves: int = 0


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    names = ("LISTEN_ADDR", "GATEWAY_ADDR", "SIMULATOR_LISTEN", "AUTOSCALER_ADDR")
    addresses = {name: f"127.0.0.1:{free_port()}" for name in names}
    environment = {name: value for name, value in os.environ.items() if name != "ANTHROPIC_API_KEY"} | addresses
    environment |= {
        "STATE_DIR": str(tmp_path), "MIN_AGENTS": str(AGENTS), "MAX_AGENTS": str(AGENTS), "COMPUTE_BACKEND": "process",
        "HEALTH_CHECK_INTERVAL": "1", "ALLOW_UNISOLATED_TOOLS": "1", "RATE_LIMIT_PER_MINUTE": "0",
        "RATE_LIMIT_PER_HOUR": "0",
    }  # fmt: skip
    log = tmp_path / "up.log"
    with log.open("wb") as output:
        up = subprocess.Popen(
            [sys.executable, "-m", "hypercore_agents", "up", "--demo"],
            env=environment, cwd=tmp_path, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as http:
            site = Site(f"http://{addresses['LISTEN_ADDR']}", f"http://{addresses['SIMULATOR_LISTEN']}", http)
            deadline = time.monotonic() + 180
            while True:
                assert up.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                with contextlib.suppress(aiohttp.ClientError):
                    if (await site.stats())["pool"]["running"] == AGENTS:
                        break
                await asyncio.sleep(0.1)
            yield site
    finally:
        up.send_signal(signal.SIGTERM)
        await asyncio.to_thread(up.wait, 120)


async def acknowledged(site: Site, conversation: Conversation, prompt: str) -> dict[str, Any] | None:
    """Send a turn once; return its answer, or None if it was not acknowledged."""
    status, answer = await site.chat(conversation.user_id, prompt, conversation.session_id)
    if status != 200:
        assert status in (409, 502, 503, 504), answer
        return None
    if conversation.agent_id not in ("", answer["agent_id"]):
        conversation.moves += 1
    conversation.session_id, conversation.agent_id = answer["session_id"], answer["agent_id"]
    return answer if answer["status"] == "completed" else None


async def until_acknowledged(site: Site, conversation: Conversation, prompt: str) -> dict[str, Any]:
    """Send a turn until it is acknowledged."""
    deadline = time.monotonic() + 150
    while True:
        answer = await acknowledged(site, conversation, prompt)
        if answer is not None:
            return answer
        assert time.monotonic() < deadline, f"{conversation} never got an answer"
        await asyncio.sleep(0.2)


async def converse(site: Site, conversation: Conversation, done: asyncio.Event, choose: random.Random) -> None:
    """Write a file in every turn until `done` is set."""
    number = 0
    while not done.is_set():
        number += 1
        name, word = f"file-{number}.txt", f"word-{choose.getrandbits(32):08x}"
        write = json.dumps({"file_path": name, "content": word})
        conversation.maybe.append(word)
        answer = await acknowledged(site, conversation, f"{word} [[tool Write {write}]] [[tokens 40]] [[rate 80]]")
        if answer is None:
            await asyncio.sleep(0.2)
        else:
            assert answer["tools"], answer
            if answer["durable"]:
                conversation.words.append(word)
            if answer["workspace_durable"]:
                conversation.files.append(word)


async def test_acknowledged_turns_and_durable_files_survive_kills(site: Site, capsys: Any) -> None:
    choose = random.Random(SEED)
    conversations = [Conversation(f"user-{number}") for number in range(USERS)]
    done = asyncio.Event()
    tasks = [asyncio.create_task(converse(site, one, done, random.Random(choose.random()))) for one in conversations]
    killed = 0
    try:
        while killed < KILLS:
            waits = sum(len(one.words) for one in conversations) + choose.randint(1, 4)
            deadline = time.monotonic() + 150
            while sum(len(one.words) for one in conversations) < waits:  # kill at different points of turns
                failed = [task for task in tasks if task.done()]
                assert not failed, failed[0].exception()
                assert time.monotonic() < deadline, f"no turn is acknowledged any more: {conversations}"
                await asyncio.sleep(choose.uniform(0.01, 0.2))
            victims = [one.agent_id for one in conversations if one.agent_id]
            killed += bool(victims and site.kill(choose.choice(victims)))
    finally:
        done.set()
    await asyncio.gather(*tasks)
    first = conversations[0]
    site.kill(first.agent_id)
    read = await files_of(site, first)
    assert [word for word in first.files if word not in read] == [], "durable files cannot be read without a turn"
    for one in conversations:
        answer = await until_acknowledged(site, one, '[[tool Bash {"command": "cat file-*.txt"}]]')
        assert [word for word in one.files if word not in answer["content"]] == [], "durable files are missing"
        found = (await model_messages(site, one)).count
        assert [word for word in one.words if not found(word)] == [], "acknowledged turns are missing"
    moves = sum(one.moves for one in conversations)
    turns = sum(len(one.words) for one in conversations)
    with capsys.disabled():
        sys.stderr.write(f"\n{killed} kills, {moves} moves, {turns} acknowledged turns, seed {SEED}\n")
    assert moves > 0


async def files_of(site: Site, conversation: Conversation) -> list[str]:
    """Return the content of a session's files; retry until the platform has placed the session again."""
    folder = f"{site.url}/v1/agent/session/{conversation.session_id}/files"

    async def get(url: str) -> bytes:
        deadline = time.monotonic() + 150
        while True:
            async with site.http.get(url) as answer:
                if answer.status == 200:
                    return await answer.read()
                assert answer.status in (502, 503), await answer.text()
            assert time.monotonic() < deadline, f"{url} cannot be read"
            await asyncio.sleep(0.2)

    names = [entry["path"] for entry in json.loads(await get(folder))["files"]]
    return [(await get(f"{folder}/{name}")).decode() for name in names]


async def model_messages(site: Site, conversation: Conversation) -> str:
    """Send one more turn; return the messages that reached the model, including the resumed history."""
    mark = f"enough of {conversation.session_id}"
    await until_acknowledged(site, conversation, mark)
    async with site.http.get(f"{site.simulator}/simulator/requests?limit=50") as answer:
        assert answer.status == 200, await answer.text()
        requests = (await answer.json())["requests"]
    sent = [json.dumps(request["body"]["messages"]) for request in requests if request["path"] == "/v1/messages"]
    return [messages for messages in sent if mark in messages][-1]
