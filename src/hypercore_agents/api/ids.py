"""Identifiers: how they are created, and the format required of those from outside."""

import random
import re
import secrets
import uuid
from typing import Annotated

from pydantic import StringConstraints

from hypercore_agents.api.names import name_of

AGENT_ID_PATTERN = r"^agent-[0-9a-f]{16}$"
SESSION_ID_PATTERN = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
USER_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._@:+-]{0,127}$"
USER_ID_RULE = "1 to 128 letters, digits and ._@:+-, beginning with a letter or digit"
"""`USER_ID_PATTERN` in words."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

AgentId = Annotated[str, StringConstraints(pattern=AGENT_ID_PATTERN)]
"""Id of an agent; a valid DNS label, because agents also have the address `AGENT_ID.<BASE_DOMAIN>`."""

SessionId = Annotated[str, StringConstraints(pattern=SESSION_ID_PATTERN)]
"""Id of a session: a lower-case UUID, created by the manager and also used by the Claude CLI."""

UserId = Annotated[str, *name_of(USER_ID_PATTERN, USER_ID_RULE)]
"""Id of a user, chosen by the operator: 1 to 128 letters, digits and `._@:+-`."""


def new_agent_id() -> str:
    """Return a new agent id: `agent-` and 64 random bits in hex."""
    return f"agent-{secrets.token_hex(8)}"


def new_session_id() -> str:
    """Return a new session id: a random UUID."""
    return str(uuid.uuid4())


def new_request_id() -> str:
    """Return a new request id: `req_` and 96 random bits in hex. It is not a secret, so it costs no system call."""
    return f"req_{random.getrandbits(96):024x}"


def is_request_id(value: str) -> bool:
    """Return whether a client's request id is safe to log and to pass on."""
    return _REQUEST_ID.fullmatch(value) is not None
