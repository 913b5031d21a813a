"""Session options: resolved at a session's first turn, then frozen. Pure.

The request's options override the agent's defaults, which override the platform's. A later turn may repeat an option
but not change it. Lists of tools and rules are compared as sets: their order and repetitions do not matter.
"""

import json
from typing import Any

from hypercore_agents.api.errors import Conflict
from hypercore_agents.api.options import SessionOptions

_SETS = frozenset({"tools", "allowed_tools", "disallowed_tools", "approval_tools", "skills"})


def freeze(options: SessionOptions) -> dict[str, Any]:
    """Return the options in their stored form."""
    return options.model_dump(mode="json", exclude_none=True)


def refuse_changes(requested: SessionOptions, frozen: dict[str, Any]) -> None:
    """Raise Conflict, naming the field, if a requested option differs from the frozen one."""
    for name, value in freeze(requested).items():
        if name not in frozen or _canonical(name, value) != _canonical(name, frozen[name]):
            raise Conflict(
                f"{name} was fixed at the session's first turn and cannot change; omit it, repeat its first "
                "value, or start a new session",
                details={"field": name},
            )


def _canonical(name: str, value: Any) -> str:
    if name in _SETS and isinstance(value, list):
        value = sorted(set(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = float(value)
    return json.dumps(value, sort_keys=True)
