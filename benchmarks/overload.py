"""Goodput under overload: turns that end within 30 s of their arrival, at 1, 2, 4 and 8 times the measured capacity.

Open loop: turns arrive at fixed intervals, independently of earlier turns. Half of them start a new session, the rest
continue a session after its first turn; a session ends after its second turn. The platform runs on the process
backend with two agents and REQUEST_TIMEOUT=30. For comparison, with the same options, simulator and arrivals: a bare
server, one process with a `ClaudeSDKClient` per session and no limit but the machine's memory. Capacity is the
platform's throughput in a closed loop. Goodput counts the turns that end in the measured part of a run, after a warm-up
in which queues fill; rejections (429, 503) are counted separately from failures.
Aim: the platform's goodput at 2, 4 and 8 times its capacity is at least 0.8 of its peak.

With --microvm: the platform alone, on microVMs without KVM (TCG), at 4 times its capacity for ten minutes, with a
deadline of 120 s instead of 30 s.
"""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from bare_server import BARE_ADDRESS_VARIABLE
from local_platform import free_port, local_platform
from measuring import arguments, percentile, progress, table, write_json

DEADLINE, MICROVM_DEADLINE = 30.0, 120.0
"""Seconds. Without KVM the start of a CLI alone takes 6 to 10 s of processor time."""
PROMPT = "Say something short. [[tokens 20]]"
AIM_RATIO = 0.8
WORKERS = 12
"""Workers of the closed loop that measures capacity."""


@dataclass
class RunResult:
    """Results of the turns of one run. Times are from `time.monotonic`."""

    began: float = 0.0
    good: list[tuple[float, float]] = field(default_factory=list)
    """End time and duration, in seconds, of each turn that met the deadline."""
    arrived: int = 0
    refused: int = 0
    failed: int = 0
    late: int = 0
    faults: dict[str, int] = field(default_factory=dict)

    def goodput(self, since: float, until: float) -> float:
        """Return the good turns per second that ended between two times."""
        return sum(since <= at < until for at, _ in self.good) / (until - since)


class Client:
    """Sends turns to one server and tracks the sessions after their first turn."""

    def __init__(self, url: str, http: aiohttp.ClientSession, deadline: float) -> None:
        self._deadline = deadline
        self._url = url
        self._http = http
        self._ready: deque[tuple[str, str]] = deque()
        self._users = itertools.count()
        self._numbers = itertools.count()

    async def turn(self, result: RunResult) -> None:
        """Send the next turn, alternately in a new session and in one after its first turn."""
        result.arrived += 1
        began = time.monotonic()
        session: tuple[str, str] | None = None
        if next(self._numbers) % 2 and self._ready:
            session = self._ready.popleft()
        user_id = session[1] if session else f"user-{next(self._users)}"
        body: dict[str, Any] = {"user_id": user_id, "prompt": PROMPT, "tools": []}
        if session:
            body["session_id"] = session[0]
        try:
            async with (
                asyncio.timeout(self._deadline),
                self._http.post(f"{self._url}/v1/agent/chat", json=body) as answer,
            ):
                status, body = answer.status, await answer.json()
        except TimeoutError:
            result.late += 1
            return
        except (aiohttp.ClientError, ValueError) as error:
            result.failed += 1
            result.faults[type(error).__name__] = result.faults.get(type(error).__name__, 0) + 1
            return
        if status == 200:
            now = time.monotonic()
            result.good.append((now, now - began))
            if session is None:
                self._ready.append((body["session_id"], user_id))
            else:
                await self._end(session[0])
            return
        if status in (429, 503):
            result.refused += 1
            if session is not None:
                self._ready.append(session)
            return
        result.failed += 1
        name = str(body.get("error", {}).get("type", status))
        result.faults[name] = result.faults.get(name, 0) + 1

    async def end_all(self) -> None:
        """End the remaining sessions."""
        await asyncio.gather(*(self._end(session) for session, _ in self._ready))
        self._ready.clear()

    async def _end(self, session_id: str) -> None:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with asyncio.timeout(20), self._http.delete(f"{self._url}/v1/agent/session/{session_id}") as answer:
                await answer.read()


async def closed_loop(client: Client, seconds: float) -> float:
    """Return the turns per second of a few workers that each send one turn after another."""
    result = RunResult()
    until = time.monotonic() + seconds

    async def work() -> None:
        while time.monotonic() < until:
            await client.turn(result)

    await asyncio.gather(*(work() for _ in range(WORKERS)))
    capacity = result.goodput(until - 0.7 * seconds, until)
    if result.failed or not capacity:
        raise SystemExit(f"turns failed in the closed loop, or none ended in {seconds:g} s: {result.faults}")
    return capacity


async def open_loop(client: Client, rate: float, warm_up: float, seconds: float) -> dict[str, Any]:
    """Send turns at a fixed rate; return the figures of the part after the warm-up."""
    result = RunResult(began=time.monotonic())
    turns: set[asyncio.Task[None]] = set()
    end = result.began + warm_up + seconds
    for number in itertools.count():
        at = result.began + number / rate
        if at >= end:
            break
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        task = asyncio.create_task(client.turn(result))
        turns.add(task)
        task.add_done_callback(turns.discard)
    await asyncio.sleep(max(0.0, end - time.monotonic()))
    took = [seconds for at, seconds in result.good if at >= result.began + warm_up]
    figures = {
        "rate": round(rate, 2),
        "goodput": round(result.goodput(result.began + warm_up, end), 3),
        "p50_s": round(percentile(took, 0.5), 2) if took else None,
        "p95_s": round(percentile(took, 0.95), 2) if took else None,
        "arrived": result.arrived,
        "refused": result.refused,
        "failed": result.failed,
        "late": result.late,
        "faults": result.faults,
    }
    for task in list(turns):
        task.cancel()
    await asyncio.gather(*turns, return_exceptions=True)
    await client.end_all()
    return figures


@contextlib.asynccontextmanager
async def bare_server(simulator: str) -> AsyncIterator[str]:
    """Run the bare server until the block ends; yield its URL."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="hypercore-bare-") as folder:
        environment = {**os.environ, BARE_ADDRESS_VARIABLE: str(port), "SIMULATOR": simulator, "FOLDER": folder}
        script = Path(__file__).with_name("bare_server.py")
        process = subprocess.Popen(
            [sys.executable, str(script)], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )
        url = f"http://127.0.0.1:{port}"
        try:
            async with aiohttp.ClientSession() as http:
                for _ in range(200):
                    with contextlib.suppress(aiohttp.ClientError):
                        async with http.get(f"{url}/health"):
                            break
                    await asyncio.sleep(0.1)
            yield url
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, 20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.to_thread(process.wait, 20)


async def measure(
    name: str, url: str, capacity: float, times: list[int], warm_up: float, seconds: float, deadline: float
) -> list[dict[str, Any]]:
    """Run the open loop at multiples of a capacity, one after another."""
    found = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as http:
        for multiple in times:
            client = Client(url, http, deadline)
            figures = {"times": multiple, **await open_loop(client, multiple * capacity, warm_up, seconds)}
            found.append(figures)
            progress(f"{name}: {json.dumps(figures)}")
            await asyncio.sleep(2)
    return found


async def run(quick: bool, microvm: bool) -> dict[str, Any]:
    """Measure the platform and the bare server."""
    os.environ.pop("ANTHROPIC_API_KEY", None)
    deadline = MICROVM_DEADLINE if microvm else DEADLINE
    settings = {"SIMULATOR_TTFT": "0.1", "SIMULATOR_RATE": "0", "REQUEST_TIMEOUT": str(int(deadline))}
    if microvm:
        settings |= {"BOOT_TIMEOUT": "240", "START_TIMEOUT": "600"}
    times, warm_up, seconds, loop = ([1, 4], 3.0, 5.0, 8.0) if quick else ([1, 2, 4, 8], 30.0, 45.0, 20.0)
    backend = "microvm" if microvm else "process"
    if microvm:
        times, warm_up, seconds, loop = [4], 60.0, 540.0, 120.0
    async with local_platform(agents=2, backend=backend, **settings) as platform:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as http:
            client = Client(platform.manager, http, deadline)
            capacity = await closed_loop(client, loop)
            await client.end_all()
        progress(f"capacity: {capacity:.2f} turns/s")
        ours = await measure("platform", platform.manager, capacity, times, warm_up, seconds, deadline)
        bare: list[dict[str, Any]] = []
        if not microvm:
            async with bare_server(platform.simulator) as url:
                bare = await measure("bare server", url, capacity, times, warm_up, seconds, deadline)
    return {"backend": backend, "deadline_s": deadline, "capacity": round(capacity, 3), "platform": ours, "bare": bare}


def main() -> None:
    """Run from the command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--microvm", action="store_true", help="4 times capacity for ten minutes on microVMs (TCG)")
    options = parser.parse_args()
    figures = asyncio.run(run(options.quick, options.microvm))
    peak = max(figures["capacity"], *(point["goodput"] for point in figures["platform"]))
    rows = []
    for name in ("platform", "bare"):
        for point in figures[name]:
            point["of_peak"] = round(point["goodput"] / peak, 3)
            rows.append([
                name, f"{point['times']}x", f"{point['rate']:.1f}",
                f"{point['goodput']:.2f}", f"{point['of_peak']:.2f}",
                "-" if point["p50_s"] is None else f"{point['p50_s']:.1f} / {point['p95_s']:.1f}",
                str(point["refused"]), str(point["late"]), str(point["failed"]),
            ])  # fmt: skip
    table(
        f"Turns within {figures['deadline_s']:g} s of their arrival, {figures['backend']} backend, "
        f"capacity {figures['capacity']:.2f} turns/s",
        ["", "load", "arrivals/s", "goodput/s", "of peak", "p50 / p95 (s)", "refused", "late", "failed"],
        rows,
    )
    met = all(point["of_peak"] >= AIM_RATIO for point in figures["platform"] if point["times"] > 1)
    progress(f"aim (goodput at least {AIM_RATIO} of the peak at every overload): {'met' if met else 'missed'}")
    write_json(options.json, {"benchmark": "overload", "aims_met": met, "peak": round(peak, 3), **figures})


if __name__ == "__main__":
    main()
