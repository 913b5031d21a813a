"""Identifiers: how each is made, and the shape it must have when it comes from outside."""

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
USER_ID_RULE = "1 to 128 of letters, digits and ._@:+-, beginning with a letter or digit"
"""`USER_ID_PATTERN` in words."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

AgentId = Annotated[str, StringConstraints(pattern=AGENT_ID_PATTERN)]
"""Names an agent; a valid DNS label, since agents are also addressed as `AGENT_ID.<BASE_DOMAIN>`."""

SessionId = Annotated[str, StringConstraints(pattern=SESSION_ID_PATTERN)]
"""Names a session; a lower-case UUID, minted by the manager and used by the Claude CLI as it is."""

UserId = Annotated[str, *name_of(USER_ID_PATTERN, USER_ID_RULE)]
"""Names a user of the platform's operator; 1 to 128 characters, letters, digits and `._@:+-`."""


def new_agent_id() -> str:
    """Return a fresh agent id: `agent-` and 64 random bits in hex."""
    return f"agent-{secrets.token_hex(8)}"


def new_session_id() -> str:
    """Return a fresh session id: a random UUID."""
    return str(uuid.uuid4())


def new_request_id() -> str:
    """Return a fresh request id: `req_` and 96 random bits in hex. It is a name, no secret: no system call for it."""
    return f"req_{random.getrandbits(96):024x}"


def is_request_id(value: str) -> bool:
    """Say whether a request id that a client sent is safe to log and to pass on."""
    return _REQUEST_ID.fullmatch(value) is not None
