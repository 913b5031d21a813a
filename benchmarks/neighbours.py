"""The effect of one user's attack on another user of the same agent: the victim's p95 under attack and without.

One pool agent of the process backend with sessions isolated by the launcher (run as root). The victim sends short turns
in a warm session at a steady pace. Before each attack its turns are timed without one; then the sessions of another
user attack in one way, with an ordinary user's rights. The benchmark counts the victim's failed turns and wrong answers
(text of another turn). Aim: none of either.
"""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from local_platform import LocalPlatform, local_platform
from measuring import arguments, percentile, progress, table, write_json

VICTIM, ATTACKER = "victim", "attacker"
PACE_SECONDS = 0.25
ATTACKING_SESSIONS = 4
SHOWN = ("quiet_p95_ms", "attacked_p95_ms", "ratio")
AGENT = '{"cores": 2, "memory": 6144}'

_CONNECT = "exec 3<>/dev/tcp/127.0.0.1/8090"
_HEAD = "POST /v1/messages HTTP/1.1\\r\\nhost: a\\r\\ncontent-type: application/json\\r\\n"
TOOLS = {
    "unlinked file": "exec 3>f; rm f; head -c 8000000000 /dev/zero >&3",
    "many files": "i=0; while mkdir -p d$((i / 500)) && : > d$((i / 500))/$i; do i=$((i + 1)); done",
    "processes": "for i in $(seq 600); do sleep {seconds} & done; wait",
    "memory": "for i in 1 2 3 4; do head -c 3000000000 /dev/zero | tail & done; wait",
    "processor": "for i in 1 2 3 4; do while :; do :; done & done; sleep {seconds}",
    "nodes to the gateway": (
        f"{_CONNECT}; printf '{_HEAD}content-length: 28000000\\r\\n\\r\\n' >&3; "
        "yes '{},' | tr -d '\\n' | head -c 28000000 >&3; timeout {seconds} cat <&3"
    ),
    "refused requests": (
        f"while {_CONNECT}; do printf '{_HEAD}content-length: 2\\r\\n\\r\\n[]' >&3; timeout 1 head -c 200 <&3; done"
    ),
}
"""Attacks by a tool: the command of each of the attacker's sessions. `{seconds}` is the duration of the attack."""


@dataclass
class Turns:
    """The victim's turns in one period."""

    seconds: list[float] = field(default_factory=list)
    failed: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)


async def chat(http: aiohttp.ClientSession, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Send one turn; return its status and answer."""
    async with http.post("/v1/agent/chat", json=body) as answer:
        document: dict[str, Any] = await answer.json()
        return answer.status, document


async def victim(http: aiohttp.ClientSession, session: str, stop: asyncio.Event) -> Turns:
    """Send short turns in one session until `stop` is set; each requests a different word."""
    turns = Turns()
    while not stop.is_set():
        word = f"w{len(turns.seconds) + turns.failed}x{time.monotonic_ns()}"
        began = time.perf_counter()
        try:
            status, answer = await chat(http, {"user_id": VICTIM, "session_id": session, "prompt": f"[[say {word}]]"})
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            status, answer = 0, {"error": {"type": type(error).__name__, "message": str(error)}}
        if status == 200:
            turns.seconds.append(time.perf_counter() - began)
            turns.wrong += answer["content"].strip() != word
        else:
            turns.failed += 1
            turns.errors.append(f"{status} {answer['error']['type']}: {answer['error']['message']}"[:200])
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), PACE_SECONDS)
    return turns


async def timed(http: aiohttp.ClientSession, session: str, seconds: float) -> Turns:
    """Return the victim's turns during a number of seconds."""
    stop = asyncio.Event()
    running = asyncio.create_task(victim(http, session, stop))
    await asyncio.sleep(seconds)
    stop.set()
    return await running


async def by_tool(http: aiohttp.ClientSession, command: str, seconds: float) -> None:
    """Run a command in each of the attacker's sessions until cancelled; delete the sessions afterwards."""
    shown = command.replace("{seconds}", f"{seconds:g}")
    call = f"[[tool Bash {json.dumps({'command': shown, 'timeout': int(seconds * 1000)})}]]"
    sessions: list[str] = []

    async def attack() -> None:
        status, answer = await chat(http, {"user_id": ATTACKER, "prompt": "[[say ready]]", "tools": ["Bash"]})
        if status != 200:
            return
        sessions.append(answer["session_id"])
        while True:
            await chat(http, {"user_id": ATTACKER, "session_id": sessions[-1], "prompt": call})
            await asyncio.sleep(0.2)

    try:
        await asyncio.gather(*(attack() for _ in range(ATTACKING_SESSIONS)), return_exceptions=True)
    finally:
        for session in sessions:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                await http.delete(f"/v1/agent/session/{session}", params={"user_id": ATTACKER})


async def new_sessions(http: aiohttp.ClientSession, _: float) -> None:
    """Start sessions as fast as they are accepted."""

    async def attack() -> None:
        while True:
            status, answer = await chat(http, {"user_id": ATTACKER, "prompt": "[[say ready]]"})
            if status == 200:
                path = f"/v1/agent/session/{answer['session_id']}"
                await http.delete(path, params={"user_id": ATTACKER})
            await asyncio.sleep(0.05)

    await asyncio.gather(*(attack() for _ in range(ATTACKING_SESSIONS)), return_exceptions=True)


async def slow_readers(http: aiohttp.ClientSession, seconds: float) -> None:
    """Download one large file in several connections and read almost nothing of it."""
    making = f"[[tool Bash {json.dumps({'command': 'truncate -s 60000000 big'})}]]"
    status, answer = await chat(http, {"user_id": ATTACKER, "prompt": making, "tools": ["Bash"]})
    if status != 200:
        return
    path = f"/v1/agent/session/{answer['session_id']}/files/big"

    async def attack() -> None:
        async with http.get(path, params={"user_id": ATTACKER}) as download:
            await download.content.read(1)
            await asyncio.sleep(seconds)

    await asyncio.gather(*(attack() for _ in range(3 * ATTACKING_SESSIONS)), return_exceptions=True)


async def large_bodies(http: aiohttp.ClientSession, _: float) -> None:
    """Send bodies of 15 MB of JSON nodes to the manager."""
    body = b'{"user_id": "attacker", "prompt": "x", "tags": [' + b"{}," * 5_000_000 + b"{}]}"

    async def attack() -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with http.post(
                    "/v1/agent/chat", data=body, headers={"content-type": "application/json"}
                ) as answer:
                    await answer.read()
            await asyncio.sleep(0.2)

    await asyncio.gather(*(attack() for _ in range(ATTACKING_SESSIONS)), return_exceptions=True)


Attack = Callable[[aiohttp.ClientSession, float], Awaitable[None]]


def attacks() -> dict[str, Attack]:
    """Return every attack by name."""

    def tool(command: str) -> Attack:
        return lambda http, seconds: by_tool(http, command, seconds)

    return {name: tool(command) for name, command in TOOLS.items()} | {
        "new sessions": new_sessions,
        "slow readers": slow_readers,
        "bodies to the manager": large_bodies,
    }


async def measure(platform: LocalPlatform, seconds: float, only: list[str]) -> list[dict[str, Any]]:
    """Measure the victim without an attack and under each attack."""
    timeout = aiohttp.ClientTimeout(total=max(60.0, 4 * seconds))
    connector = aiohttp.TCPConnector(limit=0)
    found = []
    async with (
        aiohttp.ClientSession(platform.manager, timeout=timeout) as calm,
        aiohttp.ClientSession(platform.manager, timeout=timeout, connector=connector) as hostile,
    ):
        status, answer = await chat(calm, {"user_id": VICTIM, "prompt": "[[say hello]]"})
        if status != 200:
            raise SystemExit(f"the victim's first turn failed: {answer}")
        session = answer["session_id"]
        for name, attack in attacks().items():
            if only and name not in only:
                continue
            quiet = await timed(calm, session, seconds)
            attacking = asyncio.ensure_future(attack(hostile, seconds))
            await asyncio.sleep(min(2.0, seconds / 4))
            under = await timed(calm, session, seconds)
            attacking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await attacking
            found.append(row(name, quiet, under))
            progress(f"{name}: {len(under.seconds)} turns, {under.failed} failed{'; ' * bool(under.errors)}"
                     f"{'; '.join(sorted(set(under.errors))[:3])}")  # fmt: skip
            await timed(calm, session, 1.0)
    return found


def row(name: str, quiet: Turns, under: Turns) -> dict[str, Any]:
    """Return the figures of one attack, in milliseconds; None if no turn succeeded."""
    before = 1000 * percentile(quiet.seconds, 0.95) if quiet.seconds else None
    during = 1000 * percentile(under.seconds, 0.95) if under.seconds else None
    return {
        "attack": name,
        "quiet_p95_ms": None if before is None else round(before, 1),
        "attacked_p95_ms": None if during is None else round(during, 1),
        "ratio": None if before is None or during is None else round(during / before, 2),
        "turns": len(under.seconds),
        "failed": under.failed + quiet.failed,
        "wrong": under.wrong + quiet.wrong,
        "errors": sorted(set(under.errors + quiet.errors)),
    }


async def run(seconds: float, only: list[str]) -> list[dict[str, Any]]:
    """Start a platform and measure every attack on it."""
    os.environ.pop("ANTHROPIC_API_KEY", None)
    async with local_platform(agents=1, SIMULATOR_TTFT="0", SIMULATOR_RATE="0", POOL_CONFIG=AGENT) as platform:
        return await measure(platform, seconds, only)


def main() -> None:
    """Run from the command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--attack", action="append", default=[], choices=sorted(attacks()), help="run only this attack")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("run it as root: only a privileged launcher isolates sessions")
    figures = asyncio.run(run(2.0 if options.quick else 20.0, options.attack))
    rows = [
        [
            found["attack"],
            *("-" if found[key] is None else f"{found[key]:.1f}" for key in SHOWN),
            str(found["turns"]), str(found["failed"]), str(found["wrong"]),
        ]
        for found in figures
    ]  # fmt: skip
    table(
        f"A victim's turns beside {ATTACKING_SESSIONS} sessions of an attacker on one agent",
        ["attack", "quiet p95 ms", "attacked p95 ms", "ratio", "turns", "failed", "wrong"],
        rows,
    )
    met = not any(found["failed"] or found["wrong"] for found in figures)
    progress(f"aim: no failed turn and no wrong answer: {'met' if met else 'missed'}")
    write_json(options.json, {"benchmark": "neighbours", "aims_met": met, "attacks": figures})


if __name__ == "__main__":
    main()
