"""Prompts and answers are logged only if LOG_CONTENT is on; secrets are never logged."""

import logging
from pathlib import Path

import pytest
import structlog

from hypercore_agents.observability.logging import configure_logging
from support.agent_server import served_agent, stand_in_gateway, turn
from support.simulator_fixtures import RunningSimulator

PROMPT = "canary-prompt-4b1e"
SECRET = "sk-ant-canary-93d7c1"


@pytest.mark.parametrize("log_content", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_content_is_logged_only_if_enabled(
    simulator: RunningSimulator, tmp_path: Path, capsys: pytest.CaptureFixture[str], log_content: bool, stream: bool
) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure_logging("agent", level="DEBUG")
    try:
        async with (
            stand_in_gateway(simulator.url) as gateway,
            served_agent(gateway, tmp_path / "agent", log_content=log_content) as agent,
        ):
            body = turn(f"Say {PROMPT} and {SECRET}.", stream=stream)
            async with agent.client.post(f"{agent.url}/v1/agent/chat", json=body, headers=agent.headers) as answer:
                assert answer.status == 200
                await answer.read()
            tokens = [gateway.bearer, gateway.secret, *gateway.agent_tokens, *gateway.session_tokens]
    finally:
        structlog.reset_defaults()
        root.handlers[:] = handlers
        root.setLevel(level)
    written = capsys.readouterr().err
    assert '"event": "request"' in written
    assert (PROMPT in written) is log_content
    assert ('"event": "turn.content"' in written) is log_content
    for secret in (SECRET, *tokens):
        assert secret not in written
