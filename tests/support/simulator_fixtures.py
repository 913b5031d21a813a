"""The simulator for all tests: real processes on a free loopback port.

`simulator` is one process for the whole run, emptied before each test; `start_simulator(**settings)` starts one of its
own with other settings (and, if asked, with its own `temporary_directory`). Both are gone at the end.
"""

import json
import os
import select
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import pytest

_START_SECONDS = 30
_STOP_SECONDS = 20


@dataclass(frozen=True)
class RunningSimulator:
    """A simulator that answers at `url`."""

    url: str
    process: "subprocess.Popen[bytes]"

    def requests(
        self, session_id: str | None = None, *, path: str = "/v1/messages", limit: int = 1000
    ) -> list[dict[str, Any]]:
        """Return the recorded requests at `path`, newest last."""
        query: dict[str, Any] = {"limit": limit} | ({"session_id": session_id} if session_id else {})
        answer = self._call("GET", f"/simulator/requests?{urlencode(query)}")
        return [each for each in answer["requests"] if each["path"] == path]

    def stats(self) -> dict[str, int]:
        """Return the counts over all workers."""
        return {name: int(value) for name, value in self._call("GET", "/simulator/stats").items()}

    def clear(self) -> None:
        """Delete recorded requests and the counts of limited faults."""
        self._call("DELETE", "/simulator/requests")

    def cli_environment(self, **more: str) -> dict[str, str]:
        """Return the environment with which the Claude CLI connects to this simulator only."""
        return {
            "ANTHROPIC_BASE_URL": self.url,
            "ANTHROPIC_API_KEY": "sk-simulated-key",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
            "DISABLE_AUTOUPDATER": "1",
            "DISABLE_TELEMETRY": "1",
            "DISABLE_ERROR_REPORTING": "1",
            **more,
        }

    def _call(self, method: str, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(urllib.request.Request(self.url + path, method=method), timeout=20) as answer:
            body = json.loads(answer.read())
            assert isinstance(body, dict)
            return body


StartSimulator = Callable[..., RunningSimulator]


def _start(*, temporary_directory: object = None, **settings: object) -> RunningSimulator:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SIMULATOR_")}
    wanted: dict[str, object] = {"listen": "127.0.0.1:0", **settings}
    environment |= {f"SIMULATOR_{name.upper()}": str(value) for name, value in wanted.items()}
    if temporary_directory is not None:
        environment["TMPDIR"] = str(temporary_directory)
    process = subprocess.Popen(
        [sys.executable, "-m", "hypercore_agents.simulator"], env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
    url = process.stdout.readline().decode().strip() if readable else ""
    if not url:
        _stop(process)
        raise RuntimeError("the simulator did not start; its error output is above")
    return RunningSimulator(url, process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture(scope="session")
def simulator_process() -> Iterator[RunningSimulator]:
    """One simulator for the whole run."""
    running = _start()
    yield running
    _stop(running.process)


@pytest.fixture
def simulator(simulator_process: RunningSimulator) -> RunningSimulator:
    """A simulator without records of earlier tests."""
    simulator_process.clear()
    return simulator_process


@pytest.fixture
def start_simulator() -> Iterator[StartSimulator]:
    """A function that starts simulators with the given settings (the names in `SimulatorSettings`)."""
    started: list[RunningSimulator] = []

    def start(**settings: Any) -> RunningSimulator:
        started.append(_start(**settings))
        return started[-1]

    yield start
    for running in started:
        _stop(running.process)
