"""The message to the user of a session whose disk is full: the limit, the usage and the remedy."""

from hypercore_agents.agent.isolation.backends import Isolation
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.agent.launcher.client import LaunchFailed
from hypercore_agents.agent.launcher.storage import Usage

_MB = 1 << 20
_LEAST_BYTES, _LEAST_FILES = _MB, 8
"""Free space below which a CLI cannot write its transcript and settings."""


async def disk_full_reason(isolation: Isolation, folder: SessionFolder) -> str | None:
    """Return the message that the session's disk is full; None if it is not, or where the kernel does not count it."""
    try:
        usage = await isolation.usage(folder)
    except LaunchFailed:
        return None
    return None if usage is None else describe(usage)


def describe(usage: Usage) -> str | None:
    """Return the message for the limit that a disk has reached, None for neither."""
    if usage.byte_limit - usage.bytes < _LEAST_BYTES:
        used = f"{-(-usage.bytes // _MB)} of {usage.byte_limit // _MB} MB are used"
    elif usage.file_limit - usage.files < _LEAST_FILES:
        used = f"{usage.files} of {usage.file_limit} files are used"
    else:
        return None
    if usage.shared_by > 1:
        return (
            f"the session's share of the agent's disk is full: {used}, since {usage.shared_by} active sessions share "
            "the disk (SCRATCH_MB); delete or shorten files of the session, or try again with fewer active sessions"
        )
    return f"the session's disk is full: {used}; delete or shorten files of the session, or start a new one"
