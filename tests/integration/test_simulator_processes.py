"""The simulator's processes: several workers, their restart and shutdown."""

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from support.simulator_fixtures import RunningSimulator, StartSimulator
from support.waiting import until

HEADERS = {"x-api-key": "k", "anthropic-version": "2023-06-01"}


def body(prompt: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": "claude-opus-5-5", "max_tokens": 100_000, "messages": messages} | more


async def ask(simulator: RunningSimulator, prompt: str, **more: Any) -> int:
    """Send a request on a new connection, so that the kernel can choose any worker."""
    async with (
        aiohttp.ClientSession(headers=HEADERS) as http,
        http.post(f"{simulator.url}/v1/messages", json=body(prompt, **more)) as answer,
    ):
        await answer.read()
        return answer.status


def workers_of(simulator: RunningSimulator) -> list[int]:
    children = Path(f"/proc/{simulator.process.pid}/task/{simulator.process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


def is_alive(pid: int) -> bool:
    """Return whether a process runs. A zombie counts as gone: the init may be slow or missing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_workers_share_faults_records_and_counts(start_simulator: StartSimulator) -> None:
    simulator = start_simulator(workers=3)
    answers = await asyncio.gather(*(ask(simulator, "[[fault 529 times=10]]") for _ in range(40)))
    assert sorted(answers) == [200] * 30 + [529] * 10
    assert len(simulator.requests()) == 40
    assert simulator.stats() | {"tokens": 0} == {
        "open_streams": 0,
        "requests": 40,
        "tokens": 0,
        "faults": 10,
        "peak_streams": 0,
        "workers": 3,
    }


async def test_a_dead_worker_is_replaced_and_nothing_is_refused(start_simulator: StartSimulator) -> None:
    simulator = start_simulator(workers=2)
    await until(lambda: len(workers_of(simulator)) == 2)
    before = workers_of(simulator)
    os.kill(before[0], signal.SIGKILL)
    assert set(await asyncio.gather(*(ask(simulator, f"request {n}") for n in range(20)))) == {200}
    await until(lambda: len(workers_of(simulator)) == 2)
    assert set(workers_of(simulator)) != set(before)


async def test_sigterm_closes_streams_and_removes_all_files(start_simulator: StartSimulator, tmp_path: Path) -> None:
    simulator = start_simulator(temporary_directory=tmp_path, workers=2, grace=0.2)
    assert len(list(tmp_path.iterdir())) == 1
    await until(lambda: len(workers_of(simulator)) == 2)
    workers = workers_of(simulator)
    async with aiohttp.ClientSession(headers=HEADERS) as http:
        streams = [
            await http.post(f"{simulator.url}/v1/messages", json=body("[[rate 1]] [[tokens 600]]", stream=True))
            for _ in range(6)
        ]
        assert simulator.stats()["open_streams"] == 6
        started = time.monotonic()
        simulator.process.terminate()
        for stream in streams:
            with pytest.raises(aiohttp.ClientError):
                await stream.read()
        await until(lambda: simulator.process.poll() is not None)
    assert time.monotonic() - started < 5
    assert simulator.process.returncode == 0
    assert not list(filter(is_alive, workers))
    assert not list(tmp_path.iterdir())


async def test_workers_end_and_clean_up_when_their_parent_is_killed(
    start_simulator: StartSimulator, tmp_path: Path
) -> None:
    simulator = start_simulator(temporary_directory=tmp_path, workers=2, grace=0.2)
    await until(lambda: len(workers_of(simulator)) == 2)
    workers = workers_of(simulator)
    simulator.process.kill()
    simulator.process.wait()
    await until(lambda: not any(map(is_alive, workers)))
    assert not list(tmp_path.iterdir())


async def test_client_disconnects_close_the_stream(simulator: RunningSimulator) -> None:
    async with (
        aiohttp.ClientSession(headers=HEADERS) as http,
        http.post(f"{simulator.url}/v1/messages", json=body("[[rate 0.01]] [[tokens 9]]", stream=True)) as answer,
    ):
        await answer.content.readany()
        await until(lambda: simulator.stats()["open_streams"] == 1)
    await until(lambda: simulator.stats()["open_streams"] == 0)


async def test_settings_set_the_defaults_of_answers(start_simulator: StartSimulator) -> None:
    simulator = start_simulator(tokens=25, ttft=0.2, fault="529 times=1", record="false")
    started = time.monotonic()
    assert await ask(simulator, "hello") == 529
    assert await ask(simulator, "hello") == 200
    assert time.monotonic() - started >= 0.4
    assert simulator.stats()["tokens"] == 25
    async with aiohttp.ClientSession() as http, http.get(f"{simulator.url}/simulator/requests") as answer:
        assert answer.status == 404
        assert "recording is off" in await answer.text()


async def test_oversized_bodies_are_rejected(simulator: RunningSimulator) -> None:
    async with (
        aiohttp.ClientSession(headers=HEADERS) as http,
        http.post(f"{simulator.url}/v1/messages", data=io.BytesIO(b" " * (33 * 1024 * 1024))) as answer,
    ):
        assert answer.status == 413
        assert (await answer.json())["error"]["type"] == "request_too_large"


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"SIMULATOR_LISTEN": "0.0.0.0:0"}, "would let other machines use the simulator"),
        ({"SIMULATOR_LISTEN": "8099"}, "is not HOST:PORT"),
        ({"SIMULATOR_FAULT": "often"}, "'often' is not one of"),
        ({"SIMULATOR_WORKERS": "0"}, "workers"),
        ({"SIMULATOR_API_KEYS_FILE": "/nowhere/keys"}, "/nowhere/keys"),
    ],
)
def test_invalid_settings_are_rejected_at_start(environment: dict[str, str], problem: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "hypercore_agents.simulator"],
        env=os.environ | {"SIMULATOR_LISTEN": "127.0.0.1:0"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode != 0
    assert problem in ended.stderr


def test_occupied_addresses_are_rejected(simulator: RunningSimulator) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for address in (f"127.0.0.1:{taken.getsockname()[1]}", simulator.url.removeprefix("http://")):
            ended = subprocess.run(
                [sys.executable, "-m", "hypercore_agents.simulator"],
                env=os.environ | {"SIMULATOR_LISTEN": address},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert ended.returncode != 0
            assert "cannot listen" in ended.stderr
