"""A hundred sessions on one agent, compared with a baseline: one permanent `ClaudeSDKClient` per session.

Both get the same sequence of turns in one run, with the same simulator and options: at most one new session per second,
and one turn per second in a randomly chosen session (seeded), while sessions are opened and afterwards. Measured: the
time from the request to the first delta, for new, live and parked sessions, and the memory (PSS) of all processes that
serve sessions: the baseline's process with its CLIs, the agent's whole tree (shim, launcher, server, CLIs). The
platform's turns pass manager, agent and gateway; the baseline connects to the simulator directly.
Aims: at most 5,500 MB for the whole agent (the baseline uses over 12,000); a new session's first delta at most 0.35 of
the baseline's; parked p95 under 1 s.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
from claude_agent_sdk import ClaudeAgentOptions, ClaudeSDKClient, ResultMessage, StreamEvent
from local_platform import LocalPlatform, local_platform
from measuring import arguments, percentile, progress, table, write_json

SYSTEM_PROMPT = "You are a helpful assistant."
PROMPT = "Say something short. [[tokens 20]]"
AIM_AGENT_MB, AIM_NEW_RATIO, AIM_PARKED_MS = 5500, 0.35, 1000
SEED = 7341

Open = Callable[[int], Awaitable[float]]
"""Opens the session with this number and runs its first turn; returns the seconds to the first delta."""
Continue = Callable[[int], Awaitable[tuple[str, float]]]
"""Runs a turn in that session; returns its state before ("live" or "parked") and the seconds to the first delta."""


async def run_turns(name: str, sessions: int, turns: int, open_: Open, continue_: Continue) -> dict[str, list[float]]:
    """Open sessions and run turns, each at most once per second."""
    found: dict[str, list[float]] = {"new": [], "live": [], "parked": []}
    choices = random.Random(SEED)
    for second in range(sessions + turns):
        began = time.monotonic()
        if second < sessions:
            found["new"].append(await open_(second))
        if second:
            kind, seconds = await continue_(choices.randrange(min(second, sessions)))
            found[kind].append(seconds)
        if second % 20 == 0:
            progress(f"{name}: second {second} of {sessions + turns}")
        await asyncio.sleep(max(0.0, 1.0 - (time.monotonic() - began)))
    return found


def tree(root: int) -> set[int]:
    """Return the process ids of a process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, pending = {root}, [root]
    while pending:
        below = children.get(pending.pop(), [])
        found.update(below)
        pending += below
    return found


def pss_mb(pids: set[int]) -> float:
    """Return the proportional set size of processes, in MB; requires root for processes of other users."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            match = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(match[1]) if match else 0
    return total / 1024


async def plain(simulator: str, sessions: int, turns: int) -> tuple[dict[str, list[float]], float, int]:
    """Measure the baseline: one permanent client per session."""
    clients: list[ClaudeSDKClient] = []
    before = tree(os.getpid())

    async def turn(client: ClaudeSDKClient, began: float) -> float:
        first = None
        await client.query(PROMPT)
        async for message in client.receive_response():
            if first is None and isinstance(message, StreamEvent) and message.event["type"] == "content_block_delta":
                first = time.perf_counter() - began
            if isinstance(message, ResultMessage) and message.is_error:
                raise SystemExit(f"the baseline's turn failed: {message.result}")
        assert first is not None
        return first

    with tempfile.TemporaryDirectory() as root:

        async def open_(number: int) -> float:
            folder = Path(root, str(number))
            folder.mkdir()
            began = time.perf_counter()
            clients.append(ClaudeSDKClient(plain_options(simulator, folder)))
            await clients[-1].connect()
            return await turn(clients[-1], began)

        async def continue_(number: int) -> tuple[str, float]:
            return "live", await turn(clients[number], time.perf_counter())

        found = await run_turns("plain", sessions, turns, open_, continue_)
        memory = pss_mb(tree(os.getpid()) - before | {os.getpid()})
        await asyncio.gather(*(client.disconnect() for client in clients))
    return found, memory, sessions


def plain_options(simulator: str, folder: Path) -> ClaudeAgentOptions:
    """Return the options of an agent's session, but with a direct connection to the API."""
    return ClaudeAgentOptions(
        tools=[],
        setting_sources=[],
        strict_mcp_config=True,
        skills=[],
        system_prompt=SYSTEM_PROMPT,
        include_partial_messages=True,
        verbatim_prompts=True,
        permission_mode="dontAsk",
        cwd=folder,
        env={
            "ANTHROPIC_BASE_URL": simulator,
            "ANTHROPIC_AUTH_TOKEN": "benchmark",
            "CLAUDE_CONFIG_DIR": f"{folder}/config",
            "HOME": str(folder),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
        },
    )


async def ours(platform: LocalPlatform, sessions: int, turns: int) -> tuple[dict[str, list[float]], float, int]:
    """Measure the platform with one agent in its pool."""
    ids: dict[int, str] = {}
    async with aiohttp.ClientSession() as http:

        async def resumed() -> int:
            async with http.get(f"{platform.manager}/agents/{agent}/metrics") as answer:
                match = re.search(r"^agent_sessions_resumed_total ([\d.]+)", await answer.text(), re.MULTILINE)
            return int(float(match[1])) if match else 0

        async def turn(number: int, **more: Any) -> float:
            body = {"user_id": f"user-{number}", "prompt": PROMPT, "stream": True, **more}
            first, began = None, time.perf_counter()
            async with http.post(f"{platform.manager}/v1/agent/chat", json=body) as answer:
                if answer.status != 200:
                    raise SystemExit(f"the platform's turn failed: {await answer.text()}")
                event = ""
                async for line in answer.content:
                    if line.startswith(b"event:"):
                        event = line[6:].strip().decode()
                        if event == "delta" and first is None:
                            first = time.perf_counter() - began
                    elif event == "error" and line.startswith(b"data:"):
                        raise SystemExit(f"the platform's turn failed: {line.decode()}")
                    elif event == "session" and line.startswith(b"data:"):
                        ids[number] = json.loads(line[5:])["session_id"]
            if first is None:
                raise SystemExit(f"the platform's turn had no delta; it ended with {event}")
            return first

        async def open_(number: int) -> float:
            return await turn(number, system_prompt=SYSTEM_PROMPT, tools=[])

        async def continue_(number: int) -> tuple[str, float]:
            before = await resumed()
            seconds = await turn(number, session_id=ids[number])
            return ("parked" if await resumed() > before else "live"), seconds

        async with http.get(f"{platform.manager}/v1/agents/list") as answer:
            agent = (await answer.json())["agents"][0]["agent_id"]
        # After the first sessions the agent prewarms CLIs with their options, as in production.
        for number in range(sessions, sessions + 2):
            await open_(number)
            await http.delete(f"{platform.manager}/v1/agent/session/{ids[number]}")
        found = await run_turns("platform", sessions, turns, open_, continue_)
        live = await _live(http, platform, agent)
    return found, pss_mb(tree(_shim_of(agent))), live


async def _live(http: aiohttp.ClientSession, platform: LocalPlatform, agent: str) -> int:
    async with http.get(f"{platform.manager}/agents/{agent}/metrics") as answer:
        match = re.search(r"^agent_live_sessions ([\d.]+)", await answer.text(), re.MULTILINE)
    return int(float(match[1])) if match else 0


def _shim_of(agent: str) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().split(b"\0")
                if agent.encode() in command and any(part.endswith(b"/shim.py") for part in command):
                    return int(entry.name)
    raise SystemExit(f"the shim of {agent} was not found")


def figures_of(side: tuple[dict[str, list[float]], float, int]) -> dict[str, Any]:
    """Return p50 and p95 in milliseconds by kind, total MB, and the number of live processes."""
    found, memory, live = side
    figures: dict[str, Any] = {"memory_mb": round(memory), "processes": live}
    for kind, values in found.items():
        figures[kind] = None if not values else {
            "turns": len(values),
            "p50_ms": round(1000 * percentile(values, 0.5), 1),
            "p95_ms": round(1000 * percentile(values, 0.95), 1),
        }  # fmt: skip
    return figures


async def run(quick: bool) -> dict[str, Any]:
    """Measure the platform and the baseline."""
    os.environ.pop("ANTHROPIC_API_KEY", None)
    sessions, turns, live = (14, 10, 8) if quick else (100, 20, 40)
    settings = {"SIMULATOR_TTFT": "0", "SIMULATOR_RATE": "0", "LIVE_SESSIONS": str(live)}
    async with local_platform(agents=1, **settings) as platform:
        own = figures_of(await ours(platform, sessions, turns))
        beside = figures_of(await plain(platform.simulator, sessions, turns))
    return {"sessions": sessions, "live_sessions": live, "platform": own, "plain": beside}


def main() -> None:
    """Run from the command line."""
    options = arguments(__doc__ or "").parse_args()
    figures = asyncio.run(run(options.quick))
    rows = []
    for name in ("plain", "platform"):
        side = figures[name]
        kinds = [side[kind] for kind in ("new", "live", "parked")]
        cells = [f"{kind['p50_ms']:.0f} / {kind['p95_ms']:.0f}" if kind else "-" for kind in kinds]
        rows.append([name, f"{side['memory_mb']:,}", str(side["processes"]), *cells])
    table(
        f"{figures['sessions']} sessions: memory (PSS, MB), processes, first delta p50 / p95 (ms)",
        ["", "memory", "processes", "new", "live", "parked"],
        rows,
    )
    own, beside = figures["platform"], figures["plain"]
    figures["new_ratio_p50"] = round(own["new"]["p50_ms"] / beside["new"]["p50_ms"], 3)
    aims = {
        f"agent <= {AIM_AGENT_MB} MB": own["memory_mb"] <= AIM_AGENT_MB,
        f"new p50 <= {AIM_NEW_RATIO} of the baseline's": figures["new_ratio_p50"] <= AIM_NEW_RATIO,
        f"parked p95 < {AIM_PARKED_MS} ms": bool(own["parked"]) and own["parked"]["p95_ms"] < AIM_PARKED_MS,
    }
    progress(f"new session, first delta p50: {figures['new_ratio_p50']} of the baseline's")
    for aim, met in aims.items():
        progress(f"aim ({aim}): {'met' if met else 'missed'}")
    write_json(options.json, {"benchmark": "session_density", "aims_met": all(aims.values()), **figures})


if __name__ == "__main__":
    main()
