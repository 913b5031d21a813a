"""Requests of `up --detach` and `doctor` to local addresses, and the answers that they accept."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from hypercore_agents.cli import detach, services


class _Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"status": "ready"}'
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Ready) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/ready"
        server.shutdown()
        thread.join()


def test_requests_to_local_addresses_bypass_a_proxy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # no process listens there
    assert detach._get(url) == {"status": "ready"}
    assert services._probe(url.removesuffix("/ready")).state == "ready"


@pytest.mark.parametrize("ends", ["before", "while"])
def test_answers_count_only_while_the_started_process_runs(ends: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:

        def end() -> bool:
            process.kill()
            process.wait()
            return True

        if ends == "before":
            end()
        with pytest.raises(detach._NotStarted):
            detach._until(process, 60, end, "late")


def test_answers_of_a_running_process_count() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        detach._until(process, 60, lambda: True, "late")
        process.kill()
