"""Log lines that clients can cause are limited by kind, and omitted lines are counted."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from hypercore_agents.observability import log_limits
from hypercore_agents.observability.log_limits import LogLimits
from hypercore_agents.observability.logging import configure_logging


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[io.StringIO, Clock]]:
    """Configure logging as a role does; return its output and the clock of the limits."""
    clock, stream, root = Clock(), io.StringIO(), logging.getLogger()
    before, level = root.handlers[:], root.level
    monkeypatch.setattr("hypercore_agents.observability.logging.LogLimits", lambda: LogLimits(clock))
    configure_logging("gateway")
    handler = root.handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    try:
        yield stream, clock
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def log_refusal(subject: str) -> None:
    structlog.get_logger("access").info(
        "request", path="/v1/messages", status=400, outcome="client_error", session_id=subject
    )


def test_a_flood_is_counted_and_other_lines_are_written(written: tuple[io.StringIO, Clock]) -> None:
    stream, clock = written
    for _ in range(5000):
        log_refusal("attacker")
        clock.now += 0.001
    log_refusal("victim")
    found = lines(stream)
    assert len([line for line in found if line["session_id"] == "attacker"]) < 30
    assert found[-1]["session_id"] == "victim"
    clock.now += 5
    log_refusal("attacker")
    left_out = sum(line.get("left_out", 0) for line in lines(stream))
    assert left_out + len([line for line in lines(stream) if line["session_id"] == "attacker"]) == 5001


def test_the_count_of_an_ended_flood_is_reported_later(written: tuple[io.StringIO, Clock]) -> None:
    stream, clock = written
    for _ in range(100):
        log_refusal("attacker")
    clock.now += 60
    structlog.get_logger("other").info("agent.started")
    found = lines(stream)
    assert any("log.left_out: 80 more lines like request" in line["event"] for line in found)
    assert found[-1]["event"] == "agent.started"


def test_successes_and_failed_charges_are_never_omitted(written: tuple[io.StringIO, Clock]) -> None:
    stream, _ = written
    for _ in range(300):
        structlog.get_logger("access").info("request", path="/", status=200, outcome="ok", session_id="s")
        structlog.get_logger("gateway").error("ledger.write_failed", session_id="s")
        structlog.get_logger("fleet").info("agent.started", agent_id="a")
    assert len(lines(stream)) == 900


def test_library_lines_are_limited(written: tuple[io.StringIO, Clock]) -> None:
    stream, clock = written
    for _ in range(500):
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    assert len(lines(stream)) == 20
    clock.now += 2
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    assert "480 more like this were left out" in lines(stream)[-1]["event"]


def test_many_kinds_share_a_limit_and_are_forgotten(written: tuple[io.StringIO, Clock]) -> None:
    stream, clock = written
    for number in range(10_000):
        log_refusal(f"session-{number}")
        clock.now += 0.001
    assert len(lines(stream)) < 800
    root = logging.getLogger()
    (limits,) = [known for known in root.handlers[0].filters if isinstance(known, LogLimits)]
    assert len(vars(limits)["_kinds"]) <= vars(log_limits)["_MAX_KINDS"] + 1


def test_a_flood_with_many_names_hides_no_error(written: tuple[io.StringIO, Clock]) -> None:
    stream, _ = written
    for number in range(2000):
        log_refusal(f"session-{number}")
    structlog.get_logger("workers").error("worker.died", number=1)
    assert lines(stream)[-1]["event"] == "worker.died"
