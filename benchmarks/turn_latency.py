"""The latency that the platform adds to a turn, compared to a bare ClaudeSDKClient.

One run, in pairs: a bare turn, then a turn through manager, agent and gateway, against the same simulator with the same
options. The result is the difference within each pair, for turns of a warm session and for first turns of new sessions.
Aim: warm p50 at most 10 ms, p95 at most 40 ms.
"""

import asyncio
import os
import tempfile
import time
from typing import Any

import aiohttp
from claude_agent_sdk import ClaudeAgentOptions, ClaudeSDKClient, ResultMessage
from local_platform import LocalPlatform, local_platform
from measuring import arguments, percentile, progress, table, write_json

PROMPT = "[[say ok]]"
AIM_P50_MS, AIM_P95_MS = 10.0, 40.0


def bare_options(simulator: str, folder: str) -> ClaudeAgentOptions:
    """Return the options that the agent sets for a session, with the API accessed directly."""
    return ClaudeAgentOptions(
        tools=[],
        setting_sources=[],
        strict_mcp_config=True,
        skills=[],
        system_prompt="You are a helpful assistant.",
        include_partial_messages=True,
        verbatim_prompts=True,
        permission_mode="dontAsk",
        cwd=folder,
        env={
            "ANTHROPIC_BASE_URL": simulator,
            "ANTHROPIC_AUTH_TOKEN": "benchmark",
            "CLAUDE_CONFIG_DIR": f"{folder}/config",
            "HOME": folder,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
            "DISABLE_TELEMETRY": "1",
            "DISABLE_ERROR_REPORTING": "1",
            "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
        },
    )


async def bare_turn(client: ClaudeSDKClient) -> float:
    """Return the duration of one turn, in seconds."""
    started = time.perf_counter()
    await client.query(PROMPT)
    async for message in client.receive_response():
        if isinstance(message, ResultMessage) and message.is_error:
            raise SystemExit(f"the bare turn failed: {message.result}")
    return time.perf_counter() - started


async def platform_turn(http: aiohttp.ClientSession, platform: LocalPlatform, session: str | None) -> tuple[float, str]:
    """Return the duration of one turn, in seconds, and its session."""
    body: dict[str, Any] = {"user_id": "bench", "prompt": PROMPT}
    body |= {"session_id": session} if session else {"system_prompt": "You are a helpful assistant.", "tools": []}
    started = time.perf_counter()
    async with http.post(f"{platform.manager}/v1/agent/chat", json=body) as answer:
        result = await answer.json()
        seconds = time.perf_counter() - started
        if answer.status != 200:
            raise SystemExit(f"the platform's turn failed: {result}")
    return seconds, result["session_id"]


async def warm(platform: LocalPlatform, pairs: int) -> list[tuple[float, float]]:
    """Measure pairs of turns, each side in one warm session."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        async with ClaudeSDKClient(bare_options(platform.simulator, folder)) as client, aiohttp.ClientSession() as http:
            await bare_turn(client)
            _, session = await platform_turn(http, platform, None)
            for number in range(pairs + 3):
                bare = await bare_turn(client)
                ours, _ = await platform_turn(http, platform, session)
                if number >= 3:
                    found.append((bare, ours))
                if number % 50 == 0:
                    progress(f"warm turns: {number} of {pairs} pairs")
            await http.delete(f"{platform.manager}/v1/agent/session/{session}", params={"user_id": "bench"})
    return found


async def new(platform: LocalPlatform, pairs: int) -> list[tuple[float, float]]:
    """Measure pairs of first turns, each in a new session."""
    found = []
    async with aiohttp.ClientSession() as http:
        for number in range(pairs + 1):
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                client = ClaudeSDKClient(bare_options(platform.simulator, folder))
                await client.connect()
                await bare_turn(client)
                bare = time.perf_counter() - started
                await client.disconnect()
            ours, session = await platform_turn(http, platform, None)
            await http.delete(f"{platform.manager}/v1/agent/session/{session}", params={"user_id": "bench"})
            if number >= 1:
                found.append((bare, ours))
        progress(f"new sessions: {pairs} pairs")
    return found


def summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Return p50 and p95 in milliseconds of both sides and of the difference within pairs."""
    sides = {
        "bare": [bare for bare, _ in pairs],
        "platform": [ours for _, ours in pairs],
        "added": [ours - bare for bare, ours in pairs],
    }
    return {
        f"{name}_p{round(share * 100)}_ms": round(1000 * percentile(values, share), 2)
        for name, values in sides.items()
        for share in (0.5, 0.95)
    } | {
        "ratio_p50": round(percentile(sides["platform"], 0.5) / percentile(sides["bare"], 0.5), 3),
        "pairs": len(pairs),
    }


async def run(quick: bool) -> dict[str, Any]:
    """Run both measurements."""
    os.environ.pop("ANTHROPIC_API_KEY", None)
    async with local_platform(agents=1, SIMULATOR_TTFT="0", SIMULATOR_RATE="0") as platform:
        return {
            "warm": summary(await warm(platform, 40 if quick else 300)),
            "new_session": summary(await new(platform, 5 if quick else 30)),
        }


def main() -> None:
    """Run from the command line."""
    options = arguments(__doc__ or "").parse_args()
    figures = asyncio.run(run(options.quick))
    rows = [
        [
            name,
            *(f"{found[f'{side}_p{share}_ms']:.1f}" for side in ("bare", "platform", "added") for share in (50, 95)),
            f"{found['ratio_p50']:.2f}",
            str(found["pairs"]),
        ]
        for name, found in figures.items()
    ]
    table(
        "Turn latency, ms (instant model)",
        ["turn", "bare p50", "p95", "platform p50", "p95", "added p50", "p95", "ratio", "pairs"],
        rows,
    )
    met = figures["warm"]["added_p50_ms"] <= AIM_P50_MS and figures["warm"]["added_p95_ms"] <= AIM_P95_MS
    progress(f"aim (warm, added): p50 <= {AIM_P50_MS:.0f} ms, p95 <= {AIM_P95_MS:.0f} ms: {'met' if met else 'missed'}")
    write_json(options.json, {"benchmark": "turn_latency", "aims_met": met, **figures})


if __name__ == "__main__":
    main()
