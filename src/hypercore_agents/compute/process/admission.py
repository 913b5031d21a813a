"""What this backend refuses to start, with the field and the remedy."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hypercore_agents.compute.base import NoRoom, SandboxRequest
from hypercore_agents.compute.host import request_checks
from hypercore_agents.compute.host.request_checks import refuse
from hypercore_agents.compute.process.launch import RESERVED_NAMES
from hypercore_agents.kit.linux.disk_reservations import free_and_reserved, outstanding_in

_ENVIRONMENT_BYTES = 64 * 1024


def check(request: SandboxRequest) -> None:
    """Raise SandboxRefused for what can never be started here."""
    if request.gpu_quota_mb:
        refuse("gpu_quota", "the process backend has no GPU quotas; leave it out or give 0")
    if request.image is not None:
        refuse("image", "the process backend has no images: agents run this installation; leave it out")
    request_checks.check(request, reserved_names=RESERVED_NAMES, environment_bytes=_ENVIRONMENT_BYTES)


def admit_disk(sandboxes: Path, images: Iterable[Path], session_disk_mb: int) -> None:
    """Raise NoRoom when the disk has no room for one more session beside what running ones were promised.

    A new agent promises nothing by itself; its launcher asks again for each session. `images` are the folders of
    agents' images.
    """
    free, reserve = free_and_reserved(str(sandboxes))
    promised = 0
    for folder in images:
        with suppress(OSError, ValueError):
            promised += outstanding_in(str(folder))
    left_mb = max(0, free - reserve - promised) >> 20
    if left_mb < session_disk_mb:
        raise NoRoom(
            f"this host's disk has no room for a session of {session_disk_mb} MB (SESSION_DISK_MB): of {free >> 20} MB "
            f"that are free, {promised >> 20} MB are promised to sessions and {reserve >> 20} MB are kept for the host",
            details={"disk_asked_mb": session_disk_mb, "disk_left_mb": left_mb},
        )
