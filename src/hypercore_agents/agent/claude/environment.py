"""The environment variables of a Claude CLI.

The SDK starts the CLI with all of `os.environ` plus the variables it is given. So the server clears its own
environment at start (`scrub`). A CLI then gets exactly these: the few variables that `scrub` retains, those of
`cli_environment`, and those that the SDK adds (its version, its entry point, PWD).
"""

import ctypes
from collections.abc import MutableMapping

from hypercore_agents.agent.isolation.workspace import SessionFolder

RETAINED = frozenset({"PATH", "LANG", "LC_ALL", "TZ"})
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PR_SET_DUMPABLE = 4

MODEL_RETRIES = 2
"""Retries of the CLI per model request. The CLI's default of ten can delay a turn by three minutes."""
LONGEST_MODEL_REQUEST_SECONDS = 600.0
MCP_START_SECONDS = 15.0
"""Maximum wait of a first turn for an MCP server to start. The CLI's default is 30 s."""


def scrub(environment: MutableMapping[str, str]) -> None:
    """Delete every variable of this process that is not in `RETAINED`. Call it once, after reading the settings."""
    for name in list(environment):
        if name not in RETAINED:
            del environment[name]
    environment.setdefault("PATH", _DEFAULT_PATH)
    environment.setdefault("LANG", "C.UTF-8")


def hide_memory() -> bool:
    """Make /proc/<this process> unreadable to other processes of the same uid (prctl(2), PR_SET_DUMPABLE 0).

    Tools of a session may run under the server's uid, and the server's memory holds the agent token and the bearer.
    Returns whether the kernel accepted it. Child processes are not affected.
    """
    return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)


def cli_environment(
    folder: SessionFolder,
    *,
    gateway_url: str,
    session_token: str,
    timeout: float,
    base: MutableMapping[str, str],
) -> dict[str, str]:
    """Return the variables for one session's CLI. `timeout` is the turn's, in seconds.

    PATH and LANG come from `base`, the scrubbed environment of the server.
    """
    return {
        "PATH": base.get("PATH", _DEFAULT_PATH),
        "LANG": base.get("LANG", "C.UTF-8"),
        "HOME": str(folder.home),
        "TMPDIR": str(folder.temporary),
        "CLAUDE_CONFIG_DIR": str(folder.configuration),
        "ANTHROPIC_BASE_URL": gateway_url,
        **token_environment(session_token),
        "API_TIMEOUT_MS": str(int(min(timeout, LONGEST_MODEL_REQUEST_SECONDS) * 1000)),
        "CLAUDE_CODE_MAX_RETRIES": str(MODEL_RETRIES),
        "MCP_TIMEOUT": str(int(MCP_START_SECONDS * 1000)),
        # The process sends model requests to one address, resolves no names, and sends nothing else.
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_ERROR_REPORTING": "1",
        # No session may leave a memory for another.
        "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
        # A background task would start turns without a prompt, and would end silently with its process.
        "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1",
        # The CLI retries a cut stream as a stream, so that the client continues to receive deltas.
        "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1",
        # A refusal is the answer: no hidden retry, and no other model at the caller's expense.
        "CLAUDE_CODE_DISABLE_REFUSAL_RETRY": "1",
        "CLAUDE_CODE_DISABLE_REFUSAL_FALLBACK": "1",
    }


def token_environment(session_token: str) -> dict[str, str]:
    """Return the variables that carry the session's credential. They can be changed while the CLI runs."""
    return {"ANTHROPIC_AUTH_TOKEN": session_token}
