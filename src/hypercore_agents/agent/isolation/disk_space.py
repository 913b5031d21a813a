"""What a user is told of a session whose disk is full: which limit it was, how much is used, what helps."""

from hypercore_agents.agent.isolation.backends import Isolation
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.agent.launcher.client import LaunchFailed
from hypercore_agents.agent.launcher.storage import Usage

_MB = 1 << 20
_LITTLE_BYTES, _LITTLE_FILES = _MB, 8
"""Less than this is not enough for a CLI to keep its transcript and settings."""


async def disk_full_reason(isolation: Isolation, folder: SessionFolder) -> str | None:
    """Return that the session's disk is full, for its user; None while it is not, or where nothing counts it."""
    try:
        usage = await isolation.usage(folder)
    except LaunchFailed:
        return None
    return None if usage is None else describe(usage)


def describe(usage: Usage) -> str | None:
    """Return which limit of a disk is reached, None for neither."""
    if usage.byte_limit - usage.bytes < _LITTLE_BYTES:
        held = f"{-(-usage.bytes // _MB)} of {usage.byte_limit // _MB} MB are used"
    elif usage.file_limit - usage.files < _LITTLE_FILES:
        held = f"{usage.files} of {usage.file_limit} files are used"
    else:
        return None
    if usage.shared_by > 1:
        return (
            f"the session's share of the agent's disk is full: {held}, since {usage.shared_by} active sessions share "
            "the disk (SCRATCH_MB); delete or shorten files of the session, or try again when there are fewer"
        )
    return f"the session's disk is full: {held}; delete or shorten files of the session, or start a new one"
