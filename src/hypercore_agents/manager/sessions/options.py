"""Session options: resolved at the first turn, frozen from then on. Pure.

What the request says goes before the agent's defaults, and those before the platform's. A later turn may repeat
an option but not change it. Lists of tools and rules are sets: their order and repetitions say nothing.
"""

import json
from typing import Any

from hypercore_agents.api.errors import Conflict
from hypercore_agents.api.options import SessionOptions

_SETS = frozenset({"tools", "allowed_tools", "disallowed_tools", "approval_tools", "skills"})


def freeze(options: SessionOptions) -> dict[str, Any]:
    """Return the options as they are stored."""
    return options.model_dump(mode="json", exclude_none=True)


def refuse_changes(said: SessionOptions, frozen: dict[str, Any]) -> None:
    """Raise Conflict, naming the field, when an option that is said differs from the frozen one."""
    for name, value in freeze(said).items():
        if name not in frozen or _canonical(name, value) != _canonical(name, frozen[name]):
            raise Conflict(
                f"{name} was fixed at the session's first turn and cannot change; leave it out, repeat what was said "
                "then, or start a new session",
                details={"field": name},
            )


def _canonical(name: str, value: Any) -> str:
    if name in _SETS and isinstance(value, list):
        value = sorted(set(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = float(value)
    return json.dumps(value, sort_keys=True)
