"""What this backend refuses to start, with the field and the remedy."""

import json
import re
from typing import NoReturn

from hypercore_agents.api.ids import AGENT_ID_PATTERN
from hypercore_agents.compute.base import SandboxRefused, SandboxRequest
from hypercore_agents.compute.process.launch import RESERVED_NAMES

_AGENT_ID = re.compile(AGENT_ID_PATTERN)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_BYTES = 1024
_ENVIRONMENT_BYTES = 64 * 1024


def is_agent_id(value: str) -> bool:
    """Say whether this can be the id of an agent; only then it may become a part of a path."""
    return _AGENT_ID.fullmatch(value) is not None


def check(request: SandboxRequest) -> None:
    """Raise SandboxRefused for what can never be started here."""

    def refuse(field: str, why: str) -> NoReturn:
        raise SandboxRefused(f"{field}: {why}", field=field)

    if not is_agent_id(request.agent_id):
        refuse("agent_id", f"must match {AGENT_ID_PATTERN}")
    if request.gpu_quota_mb:
        refuse("gpu_quota", "the process backend has no GPU quotas; leave it out or give 0")
    if request.image is not None:
        refuse("image", "the process backend has no images: agents run this installation; leave it out")
    if request.cores < 1 or request.memory_mb < 1:
        refuse("cores" if request.cores < 1 else "memory", "must be at least 1")
    if not 1 <= len(request.enrolment_secret.encode()) <= _SECRET_BYTES:
        refuse("enrolment_secret", f"must be 1 to {_SECRET_BYTES} bytes")
    if "\0" in request.gateway_url:
        refuse("gateway_url", "must not hold a NUL character")
    for name, value in request.environment.items():
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            refuse("environment", f"{name!r} is no variable: letters, digits and _, and no NUL in its value")
        if name in RESERVED_NAMES:
            refuse("environment", f"{name} is set by the backend; remove it")
    if sum(len(json.dumps([name, value])) for name, value in request.environment.items()) > _ENVIRONMENT_BYTES:
        refuse("environment", f"must be at most {_ENVIRONMENT_BYTES} bytes in all")
