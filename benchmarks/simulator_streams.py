"""Concurrent streams of the simulator and their cost, with the clients on the same machine.

Streams are opened evenly over a ramp and last longer than it, so that all are open at the same time. Clients are
minimal protocols in separate processes, each with its own 127.0.0.x source address. An event's lateness is its delay
against the stream's rate, counted from the stream's first event.
Aim: all streams open at once, none fails.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from measuring import arguments, percentile, progress, table, write_json

DELTA = b"event: content_block_delta"
END = b"event: message_stop"
LATE_LIMIT = 60.0
"""Seconds that a stream may be late before it counts as failed."""
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Share:
    """One client process's part of the load."""

    host: str
    port: int
    source: str
    streams: int
    tokens: int
    rate: float
    ramp: float
    begins_at: float


@dataclass
class ClientResult:
    """Results of one client process."""

    complete: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    events: int = 0
    first_seconds: list[float] = field(default_factory=list)
    late_seconds: list[float] = field(default_factory=list)

    def fail(self, why: str) -> None:
        """Count a failure."""
        self.failures[why] = self.failures.get(why, 0) + 1


class Stream(asyncio.Protocol):
    """Reads one stream and counts its events without parsing them."""

    def __init__(
        self, request: bytes, tokens: int, interval: float, result: ClientResult, done: "asyncio.Future[None]"
    ) -> None:
        self._request, self._tokens, self._interval, self._result = request, tokens, interval, result
        self.done = done
        self._tail = b""
        self._sent = self._first = 0.0
        self._events = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._sent = time.monotonic()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        data = self._tail + data
        events = data.count(DELTA)
        if events:
            if not self._first:
                self._first = now
                self._result.first_seconds.append(now - self._sent)
            self._events += events
            self._result.events += events
            self._late = now - self._first - (self._events - 1) * self._interval
            if self._events == self._tokens // 2:
                self._result.late_seconds.append(self._late)
        if END in data:
            if self._events == self._tokens:
                self._result.complete += 1
            else:
                self._result.fail(f"{self._events} of {self._tokens} events")
            self._finish()
        # The name of an event may be split between two reads; nothing longer is retained.
        cut = data.rfind(b"event: ")
        self._tail = data[cut:][:0] if cut < 0 or len(data) - cut >= len(DELTA) else data[cut:]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self._result.fail(type(exc).__name__ if exc else "closed early")
            self._finish()

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
        self._transport.abort()


def run_share(share: Share) -> ClientResult:
    """Run in a client process."""
    return uvloop.run(_run_share(share))


async def _run_share(share: Share) -> ClientResult:
    prompt = f"[[rate {share.rate}]] [[tokens {share.tokens}]]"
    body = json.dumps({
        "model": "claude-opus-5-5", "max_tokens": 100_000, "stream": True,
        "messages": [{"role": "user", "content": prompt}],
    }).encode()  # fmt: skip
    request = (
        f"POST /v1/messages HTTP/1.1\r\nhost: {share.host}\r\nx-api-key: benchmark\r\nanthropic-version: 2023-06-01\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body
    result = ClientResult()
    loop = asyncio.get_running_loop()
    waiting: list[asyncio.Future[None]] = []
    connecting: set[asyncio.Task[None]] = set()

    async def connect(done: "asyncio.Future[None]") -> None:
        try:
            await loop.create_connection(
                lambda: Stream(request, share.tokens, 1 / share.rate, result, done),
                share.host, share.port, local_addr=(share.source, 0),
            )  # fmt: skip
        except OSError as error:
            result.fail(type(error).__name__)
            done.set_result(None)

    for number in range(share.streams):
        due = share.begins_at + share.ramp * number / share.streams
        if due > time.monotonic():
            await asyncio.sleep(due - time.monotonic())
        done: asyncio.Future[None] = loop.create_future()
        waiting.append(done)
        task = asyncio.create_task(connect(done))
        connecting.add(task)
        task.add_done_callback(connecting.discard)
    expected = share.begins_at + share.ramp + share.tokens / share.rate - time.monotonic()
    _, late = await asyncio.wait(waiting, timeout=max(0.0, expected) + LATE_LIMIT)
    for _ in late:
        result.fail("never ended")
    return result


@contextmanager
def simulator(workers: int) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Run a simulator that records nothing."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SIMULATOR_")}
    environment |= {"SIMULATOR_LISTEN": "127.0.0.1:0", "SIMULATOR_RECORD": "false", "SIMULATOR_WORKERS": str(workers)}
    process = subprocess.Popen(
        [sys.executable, "-m", "hypercore_agents.simulator"], env=environment, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().decode().strip()
        if not url:
            raise SystemExit("the simulator did not start")
        with urllib.request.urlopen(f"{url}/health", timeout=30):
            yield url, process
    finally:
        process.terminate()
        process.wait(30)


def workers_of(parent: int) -> list[int]:
    """Return the process ids of a process's children."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def memory(pids: list[int]) -> int:
    """Return the private memory of processes, in bytes."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Private_"):
                total += int(line.split()[1]) * 1024
    return total


def cpu_seconds(pids: list[int]) -> float:
    """Return the processor time of processes, in seconds."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def stats(url: str) -> dict[str, int]:
    """Return the simulator's own counts."""
    with urllib.request.urlopen(f"{url}/simulator/stats", timeout=30) as answer:
        counts: dict[str, int] = json.loads(answer.read())
        return counts


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure."""
    with simulator(options.workers) as (url, process):
        host, _, port = url.removeprefix("http://").rpartition(":")
        pids = workers_of(process.pid)
        before, cpu_before = memory(pids), cpu_seconds(pids)
        begins_at = time.monotonic() + 2.0
        shares = [
            Share(
                host, int(port), f"127.0.0.{2 + number}",
                options.streams // options.clients + (number < options.streams % options.clients),
                options.tokens, options.rate, options.ramp, begins_at,
            )
            for number in range(options.clients)
        ]  # fmt: skip
        context = multiprocessing.get_context("spawn")
        plateau: list[tuple[float, int]] = []
        at_peak = 0
        with ProcessPoolExecutor(options.clients, mp_context=context) as pool:
            futures = [pool.submit(run_share, share) for share in shares]
            while not all(future.done() for future in futures):
                time.sleep(1)
                counts = stats(url)
                progress(f"open {counts['open_streams']:6d}   tokens {counts['tokens']:9d}")
                if counts["open_streams"] >= 0.95 * options.streams:
                    plateau.append((time.monotonic(), counts["tokens"]))
                    at_peak = at_peak or memory(pids)
            results = [future.result() for future in futures]
        counts = stats(url)
        cpu = cpu_seconds(pids) - cpu_before
    failures: dict[str, int] = {}
    for each in results:
        for why, count in each.failures.items():
            failures[why] = failures.get(why, 0) + count
    late = [value for each in results for value in each.late_seconds]
    first = [value for each in results for value in each.first_seconds]
    events = sum(each.events for each in results)
    rate = (plateau[-1][1] - plateau[0][1]) / (plateau[-1][0] - plateau[0][0]) if len(plateau) > 1 else 0.0
    return {
        "streams": options.streams,
        "workers": options.workers,
        "tokens_per_second_per_stream": options.rate,
        "open_at_once": counts["peak_streams"],
        "complete": sum(each.complete for each in results),
        "failures": failures,
        "events": events,
        "events_per_second_all_open": round(rate),
        "first_event_p50_ms": round(1000 * percentile(first, 0.5), 1) if first else None,
        "first_event_p95_ms": round(1000 * percentile(first, 0.95), 1) if first else None,
        "late_p50_ms": round(1000 * percentile(late, 0.5), 1) if late else None,
        "late_p95_ms": round(1000 * percentile(late, 0.95), 1) if late else None,
        "memory_per_stream_kib": round((at_peak - before) / options.streams / 1024, 1) if at_peak else None,
        "cpu_microseconds_per_event": round(1e6 * cpu / events, 1) if events else None,
    }


def main() -> None:
    """Run from the command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--streams", type=int, help="concurrent streams (10000; quick: 1000)")
    parser.add_argument("--tokens", type=int, help="events per stream (60; quick: 20)")
    parser.add_argument("--rate", type=float, default=2.0, help="events per second and stream")
    parser.add_argument("--ramp", type=float, help="seconds in which all streams are opened (15; quick: 3)")
    parser.add_argument("--workers", type=int, default=2, help="processes of the simulator")
    parser.add_argument("--clients", type=int, default=2, help="client processes")
    options = parser.parse_args()
    options.streams = options.streams or (1000 if options.quick else 10_000)
    options.tokens = options.tokens or (20 if options.quick else 60)
    options.ramp = options.ramp or (3.0 if options.quick else 15.0)
    figures = run(options)
    table(
        "Concurrent streams of the simulator",
        ["figure", "value"],
        [[name.replace("_", " "), json.dumps(value)] for name, value in figures.items()],
    )
    met = figures["open_at_once"] == figures["complete"] == options.streams and not figures["failures"]
    progress(f"aim: all {options.streams} open at once, none fails: {'met' if met else 'missed'}")
    write_json(options.json, {"benchmark": "simulator_streams", "aims_met": met, **figures})


if __name__ == "__main__":
    main()
