"""Runs every command and snippet of the README and the user documents against a demo.

Only addresses and ids are replaced. The deploy and test commands do not run as examples: the first starts this demo,
the second runs this test.
"""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from support.ports import free_port

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = ("README.md", "docs/http-api.md", "docs/command-line.md", "docs/python-client.md")
RECORDED_IN = ROOT / "docs" / "command-line.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_EXAMPLES = ("./scripts/deploy-claude-agents.sh", "./scripts/test.sh")
DEMO = "./scripts/deploy-claude-agents.sh --demo"
pytestmark = [pytest.mark.timeout(400)]


def blocks(language: str) -> list[str]:
    """Return the distinct blocks of a language, in the order of the documents."""
    texts = "\n".join((ROOT / document).read_text() for document in DOCUMENTS)
    found = dict.fromkeys(text for name, text in BLOCK.findall(texts) if name == language)
    return [text for text in found if not any(command in text for command in NOT_EXAMPLES)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start the demo with the README's first command; yield the environment for the other commands."""
    folder = tmp_path_factory.mktemp("readme")
    listen = f"127.0.0.1:{free_port()}"
    inherited = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "PYTHONPATH")}
    environment = inherited | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COMPUTE_BACKEND": "process",  # as on a machine without an image of microVMs
        "STATE_DIR": str(folder / "state"),
        "LISTEN_ADDR": listen,
        "GATEWAY_ADDR": f"127.0.0.1:{free_port()}",
        "SIMULATOR_LISTEN": f"127.0.0.1:{free_port()}",
        "AUTOSCALER_ADDR": f"127.0.0.1:{free_port()}",
        "HYPERCORE_VENV": str(Path(sys.executable).parents[1]),
        "HYPERCORE_AGENTS_URL": f"http://{listen}",
        "FOLDER": str(folder),
    }
    assert DEMO in README
    run(DEMO, environment, cwd=ROOT)
    try:
        yield environment
    finally:
        run("./scripts/deploy-claude-agents.sh --stop --purge", environment, cwd=ROOT)


def run(command: str, environment: dict[str, str], *, cwd: Path) -> str:
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        env=environment, cwd=cwd, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def spawn_agent(url: str) -> str:
    return str(post(f"{url}/v1/agents/spawn", {"user_id": "ada", "cores": 1, "memory": 1024})["agent_id"])


def start_session(url: str) -> str:
    return str(post(f"{url}/v1/agent/chat", {"user_id": "ada", "prompt": "hello"})["session_id"])


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: block.split("\n")[0][:50])
def test_documented_commands_succeed(block: str, environment: dict[str, str]) -> None:
    url = environment["HYPERCORE_AGENTS_URL"]
    text = block.replace("http://127.0.0.1:8080", url).replace("curl ", "curl -sS --fail-with-body --max-time 120 ")
    text = text.replace("http://127.0.0.1:8091", f"http://{environment['AUTOSCALER_ADDR']}")
    if "SESSION_ID" in text:
        text = text.replace("SESSION_ID", start_session(url))
    if "AGENT_ID" in text:
        text = text.replace("AGENT_ID", spawn_agent(url))
    printed = run(text, environment, cwd=Path(environment["FOLDER"]))
    assert printed.strip()


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.split("\n")[0][:50])
def test_documented_snippets_succeed(block: str, environment: dict[str, str]) -> None:
    script = Path(environment["FOLDER"]) / "snippet.py"
    script.write_text(block)
    assert run(f"{sys.executable} {script}", environment, cwd=Path(environment["FOLDER"])).strip()


def commands_shown(recording: Path) -> list[str]:
    lines = re.sub(r"<[^>]+>", "\n", recording.read_text()).split("\n")
    return [unescape(line).replace("\xa0", " ").strip() for line in lines if line.startswith("$&#160;")]


def test_the_recording_is_reproducible_by_its_command(environment: dict[str, str]) -> None:
    again = Path(environment["FOLDER"]) / "recording.svg"
    command = "python scripts/record.py docs/recording.svg"
    assert command in RECORDED_IN.read_text()
    run(command.replace("docs/recording.svg", str(again)), environment, cwd=ROOT)
    assert commands_shown(again) == commands_shown(ROOT / "docs/recording.svg")
    assert "I wrote it" in unescape(again.read_text()).replace("\xa0", " ")
