"""Checks of a request that all backends of this host make: its ids, secret, sizes and variables."""

import json
import re
from collections.abc import Set as AbstractSet
from typing import NoReturn

from hypercore_agents.api.ids import AGENT_ID_PATTERN
from hypercore_agents.compute.base import SandboxRefused, SandboxRequest

_AGENT_ID = re.compile(AGENT_ID_PATTERN)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_BYTES = 1024


def is_agent_id(value: str) -> bool:
    """Return whether a value is a valid agent id. Check it before a value becomes part of a path."""
    return _AGENT_ID.fullmatch(value) is not None


def refuse(field: str, why: str) -> NoReturn:
    """Raise SandboxRefused for a field of the request."""
    raise SandboxRefused(f"{field}: {why}", field=field)


def check(request: SandboxRequest, *, reserved_names: AbstractSet[str], environment_bytes: int) -> None:
    """Raise SandboxRefused for a request that can never be started, with the field and the remedy.

    `reserved_names` are variables that the backend sets.
    """
    if not is_agent_id(request.agent_id):
        refuse("agent_id", f"must match {AGENT_ID_PATTERN}")
    if request.cores < 1 or request.memory_mb < 1:
        refuse("cores" if request.cores < 1 else "memory", "must be at least 1")
    if not 1 <= len(request.enrolment_secret.encode()) <= _SECRET_BYTES:
        refuse("enrolment_secret", f"must be 1 to {_SECRET_BYTES} bytes")
    if "\0" in request.gateway_url:
        refuse("gateway_url", "must not contain a NUL character")
    for name, value in request.environment.items():
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            refuse(
                "environment", f"{name!r} is not a valid variable; use letters, digits and _, and no NUL in the value"
            )
        if name in reserved_names:
            refuse("environment", f"{name} is set by the backend; remove it")
    if sum(len(json.dumps([name, value])) for name, value in request.environment.items()) > environment_bytes:
        refuse("environment", f"must be at most {environment_bytes} bytes in total")
