"""Compares the relay (two workers), direct connections, and nginx with an `auth_request` to the same check, in one run.

Small responses: requests/s, and requests per CPU second of everything between client and upstream (for nginx, its
workers and the check's service). The three ways take turns, and the median of each counts. Streams: many event streams
open at once, their time to the first event, failures, and memory per stream. Needs wrk and nginx
(apt-get install wrk nginx-light).

Aims: no stream fails; p95 to the first event at most 0.5 s more than with direct connections; requests per CPU second
at least 0.8 of nginx's.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from local_platform import free_port
from measuring import arguments, percentile, progress, table, write_json
from relay_streams import TOKEN

from hypercore_agents.http.serve import raise_descriptor_limit

HERE = Path(__file__).parent
NGINX = """
worker_processes 2; worker_rlimit_nofile 20000; daemon off; pid {folder}/pid; error_log {folder}/error.log crit;
events {{ worker_connections 19000; }}
http {{
  access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream far {{ server 127.0.0.1:{upstream}; keepalive 256; }}
  upstream check {{ server 127.0.0.1:{check}; keepalive 256; }}
  server {{
    listen 127.0.0.1:{port} reuseport backlog=8192; keepalive_requests 1000000;
    location / {{
      auth_request /check; proxy_pass http://far; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_set_header X-Request-Id $request_id; add_header X-Request-Id $request_id;
    }}
    location = /check {{
      internal; proxy_pass http://check; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_pass_request_body off; proxy_set_header Content-Length "";
    }}
  }}
}}
"""


@contextlib.contextmanager
def running(*commands: list[str], port: int) -> Iterator[list[int]]:
    """Run the commands until the block ends; yields all their process ids, children included."""
    processes = [subprocess.Popen(command, cwd=HERE) for command in commands]
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                raise SystemExit(f"{commands[0]} did not start")
            time.sleep(0.05)
        yield [pid for process in processes for pid in (process.pid, *children(process.pid))]
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(30)


def children(pid: int) -> list[int]:
    """Return the direct children of a process."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cpu(pids: list[int]) -> float:
    """Return the CPU seconds that processes have used."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory(pids: list[int]) -> int:
    """Return the proportional set size of processes, in bytes."""
    total = 0
    for pid in pids:
        found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        total += int(found.group(1)) * 1024 if found else 0
    return total


def small(port: int, seconds: int, pids: list[int]) -> dict[str, float]:
    """Send small requests to one way."""
    command = ["wrk", "-t1", "-c64", f"-d{seconds}s", "--latency", "-H", f"Authorization: Bearer {TOKEN}"]
    before = cpu(pids)
    text = subprocess.run(
        [*command, f"http://127.0.0.1:{port}/small"], capture_output=True, text=True, check=True
    ).stdout
    used = cpu(pids) - before
    requests = re.search(r"(\d+) requests in", text)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    if requests is None or rate is None or "Non-2xx" in text:
        raise SystemExit(f"wrk failed:\n{text}")
    return {
        "requests_per_second": round(float(rate.group(1))),
        "requests_per_cpu_second": round(int(requests.group(1)) / used) if used else 0,
    }


def streams(port: int, count: int, over: float, pids: list[int], upstream: list[int]) -> dict[str, float]:
    """Open many streams through one way, from two processes. CPU is counted for `pids` and for `upstream`."""
    before = memory(pids)
    used, upstream_used = cpu(pids), cpu(upstream)
    outputs = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115  a pipe would fill up; closed below
    clients = [
        subprocess.Popen(
            [sys.executable, "relay_streams.py", str(port), str(count // 2), str(over), f"127.0.1.{number + 1}"],
            stdout=output, cwd=HERE,
        )
        for number, output in enumerate(outputs)
    ]  # fmt: skip
    most, began = before, time.monotonic()
    while any(client.poll() is None for client in clients):
        most = max(most, memory(pids))
        time.sleep(0.5)
    found = []
    for output in outputs:
        with output:
            output.seek(0)
            found.append(json.loads(output.read()))
    firsts = [first for one in found for first in one["first"]]
    if not firsts:
        raise SystemExit("no stream succeeded")
    return {
        "failed": sum(one["failed"] for one in found),
        "first_event_p50_ms": round(1000 * percentile(firsts, 0.5), 1),
        "first_event_p95_ms": round(1000 * percentile(firsts, 0.95), 1),
        "memory_per_stream_kb": round((most - before) / count / 1024, 1),
        "stream_cpu_seconds": round(cpu(pids) - used, 2),
        "upstream_cpu_seconds": round(cpu(upstream) - upstream_used, 2),
        "client_cpu_seconds": round(sum(one["cpu"] for one in found), 2),
        "opened_over_seconds": round(max(one["opened_over"] for one in found), 1),
        "took_seconds": round(time.monotonic() - began, 1),
    }


def run(quick: bool) -> dict[str, Any]:
    """Measure the three ways one after another."""
    for program in ("wrk", "nginx"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is missing: apt-get install -y wrk nginx-light")
    rounds, seconds, count, over = (1, 2, 1000, 2.0) if quick else (5, 4, 10_000, 10.0)
    upstream, check, relay, nginx = (free_port() for _ in range(4))
    role = [sys.executable, "relay_processes.py"]
    figures: dict[str, Any] = {"streams": count}
    with (
        tempfile.TemporaryDirectory() as folder,
        running(*[[*role, "upstream", str(upstream)]] * 2, port=upstream) as upstreams,
        running([*role, "check", str(check)], port=check) as checking,
        contextlib.ExitStack() as stack,
    ):
        configuration = Path(folder) / "nginx.conf"
        configuration.write_text(NGINX.format(folder=folder, upstream=upstream, check=check, port=nginx))
        ways: list[tuple[str, int, list[list[str]]]] = [
            ("direct", upstream, []),
            ("relay", relay, [[*role, "relay", str(relay), str(upstream)]] * 2),
            ("nginx", nginx, [["nginx", "-c", str(configuration), "-p", folder]]),
        ]
        counted = {
            name: stack.enter_context(running(*commands, port=port)) + (checking if name == "nginx" else [])
            for name, port, commands in ways
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name, _, _ in ways}
        for number in range(rounds):
            for name, port, _ in ways:
                progress(f"{name}: small responses for {seconds} s, round {number + 1} of {rounds}")
                found[name].append(small(port, seconds, counted[name]))
        for name, port, _ in ways:
            figures[name] = {key: statistics.median(one[key] for one in found[name]) for key in found[name][0]}
            progress(f"{name}: {count} streams opened over {over:.0f} s")
            figures[name] |= streams(port, count, over, counted[name], upstreams)
    figures["ratio_to_nginx_per_cpu_second"] = round(
        figures["relay"]["requests_per_cpu_second"] / figures["nginx"]["requests_per_cpu_second"], 2
    )
    figures["first_event_p95_added_ms"] = round(
        figures["relay"]["first_event_p95_ms"] - figures["direct"]["first_event_p95_ms"], 1
    )
    return figures


def main() -> None:
    """Run from the command line."""
    options = arguments(__doc__ or "").parse_args()
    raise_descriptor_limit()  # also for all child processes
    figures = run(options.quick)
    table(
        f"Relay, {figures['streams']} streams",
        [
            "way",
            "requests/s",
            "per CPU s",
            "streams failed",
            "first event p50 ms",
            "p95 ms",
            "KB per stream",
            "CPU s",
            "upstream",
            "client",
            "opened s",
            "took s",
        ],
        [[way, *(str(value) for value in figures[way].values())] for way in ("direct", "relay", "nginx")],
    )
    met = {
        "none failed": figures["relay"]["failed"] == 0,
        "p95 to first event <= +500 ms": figures["first_event_p95_added_ms"] <= 500,
        "per CPU second >= 0.8 of nginx": figures["ratio_to_nginx_per_cpu_second"] >= 0.8,
    }
    for aim, reached in met.items():
        progress(f"aim: {aim}: {'met' if reached else 'missed'}")
    ratio, added = figures["ratio_to_nginx_per_cpu_second"], figures["first_event_p95_added_ms"]
    progress(f"ratio to nginx per CPU second {ratio}, p95 to first event {added:+} ms compared to direct")
    write_json(options.json, {"benchmark": "relay", "aims_met": met, **figures})


if __name__ == "__main__":
    main()
