"""Check that sessions on this machine cannot read the platform's secret files.

Sessions of the `process` backend see parts of the host's file system (`kit.linux.session_view`): the system's folders
and what EXPOSED_PATHS and SKILLS_DIR name. A role refuses to start if `.env`, the key ring or the state folder is
in one of these and readable by all users.
"""

import os
import stat

from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.kit.environment import DEFAULT_STATE_FOLDER, ENV_FILE, setting
from hypercore_agents.kit.linux.session_view import readable_in_view


def check() -> None:
    """Raise CommandError if a session could read a secret of the platform. Only the `process` backend is concerned."""
    if (setting("COMPUTE_BACKEND") or "process") not in ("process", "auto"):
        return
    exposed = [*filter(None, (setting("EXPOSED_PATHS") or "").split(":")), *filter(None, [setting("SKILLS_DIR")])]
    for path, what in _secrets():
        part = readable_in_view(path, exposed)
        if part is not None:
            mode = stat.S_IMODE(os.stat(path).st_mode)
            tight = "700" if os.path.isdir(path) else "600"
            raise CommandError(
                f"{path} ({what}) can be read by every session on this machine: it is in {part}, which sessions "
                f"can read, and its mode is {mode:o}; run: chmod {tight} {path}"
            )


def _secrets() -> list[tuple[str, str]]:
    state = setting("STATE_DIR") or os.path.join(os.path.expanduser("~"), DEFAULT_STATE_FOLDER)
    keys = setting("KEY_FILE") or os.path.join(state, "keys.json")
    files = [(str(ENV_FILE), "the settings"), (keys, "the key ring, KEY_FILE"), (state, "the state folder, STATE_DIR")]
    return [(os.path.abspath(path), what) for path, what in files if os.path.exists(path)]
