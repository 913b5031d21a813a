"""What environment the Claude CLI gets, and how the agent's own is kept from it.

The SDK starts the CLI with everything in `os.environ` under the variables that it is told. So the server forgets its
own environment at start (`scrub`), and what a CLI gets is exactly: the few names kept there, the variables of
`cli_environment`, and those that the SDK adds by itself (its version, its entry point, PWD).
"""

import ctypes
from collections.abc import MutableMapping

from hypercore_agents.agent.isolation.workspace import SessionFolder

KEPT = frozenset({"PATH", "LANG", "LC_ALL", "TZ"})
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PR_SET_DUMPABLE = 4

MODEL_RETRIES = 2
"""Retries of the CLI per model request; its own default of ten holds a turn for three minutes."""
LONGEST_MODEL_REQUEST_SECONDS = 600.0
MCP_START_SECONDS = 15.0
"""How long a first turn waits for an MCP server to start; the CLI's own default is 30 s."""


def scrub(environment: MutableMapping[str, str]) -> None:
    """Forget every variable of this process but a harmless few. Called once, after the settings were read."""
    for name in list(environment):
        if name not in KEPT:
            del environment[name]
    environment.setdefault("PATH", _DEFAULT_PATH)
    environment.setdefault("LANG", "C.UTF-8")


def hide_memory() -> bool:
    """Make /proc/<this process> unreadable to others of the same uid (prctl(2), PR_SET_DUMPABLE 0).

    Tools of a session may run under the server's uid; the agent token and the bearer are in its memory.
    Returns whether the kernel did it. What this process starts is not affected.
    """
    return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)


def cli_environment(
    folder: SessionFolder,
    *,
    gateway_url: str,
    session_token: str,
    timeout: float,
    own: MutableMapping[str, str],
) -> dict[str, str]:
    """Return the variables for one session's CLI. `timeout` is the turn's, in seconds; `own` is the scrubbed rest."""
    return {
        "PATH": own.get("PATH", _DEFAULT_PATH),
        "LANG": own.get("LANG", "C.UTF-8"),
        "HOME": str(folder.home),
        "TMPDIR": str(folder.temporary),
        "CLAUDE_CONFIG_DIR": str(folder.configuration),
        "ANTHROPIC_BASE_URL": gateway_url,
        **token_environment(session_token),
        "API_TIMEOUT_MS": str(int(min(timeout, LONGEST_MODEL_REQUEST_SECONDS) * 1000)),
        "CLAUDE_CODE_MAX_RETRIES": str(MODEL_RETRIES),
        "MCP_TIMEOUT": str(int(MCP_START_SECONDS * 1000)),
        # one address and no name look-ups: nothing but model requests leaves the process
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_ERROR_REPORTING": "1",
        # nothing of one session may be remembered for another
        "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
        # a job in the background would start turns that nobody asked for, and die unseen with its process
        "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1",
        # a cut stream starts again as a stream, so that deltas go on
        "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1",
        # a refusal is the answer: no second try behind the caller's back, no other model at the caller's cost
        "CLAUDE_CODE_DISABLE_REFUSAL_RETRY": "1",
        "CLAUDE_CODE_DISABLE_REFUSAL_FALLBACK": "1",
    }


def token_environment(session_token: str) -> dict[str, str]:
    """Return the variables that carry the session's credential; they can be changed while the CLI runs."""
    return {"ANTHROPIC_AUTH_TOKEN": session_token}
