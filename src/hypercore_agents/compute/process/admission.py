"""The requests that this backend refuses, with the field and the remedy."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hypercore_agents.compute.base import InsufficientResources, SandboxRequest
from hypercore_agents.compute.host import request_checks
from hypercore_agents.compute.host.request_checks import refuse
from hypercore_agents.compute.process.launch import RESERVED_NAMES
from hypercore_agents.kit.linux.disk_reservations import free_and_reserved, outstanding_in

_ENVIRONMENT_BYTES = 64 * 1024


def check(request: SandboxRequest) -> None:
    """Raise SandboxRefused for a request that this backend can never start."""
    if request.gpu_quota_mb:
        refuse("gpu_quota", "the process backend has no GPU quotas; omit it or set it to 0")
    if request.image is not None:
        refuse("image", "the process backend has no images, its agents run this installation; omit it")
    request_checks.check(request, reserved_names=RESERVED_NAMES, environment_bytes=_ENVIRONMENT_BYTES)


def admit_disk(sandboxes: Path, images: Iterable[Path], session_disk_mb: int) -> None:
    """Raise InsufficientResources if the disk cannot hold one more session beside the space reserved for others.

    A new agent reserves nothing itself; its launcher reserves space for each session. `images` are the folders of the
    agents' disk images.
    """
    free, reserve = free_and_reserved(str(sandboxes))
    promised = 0
    for folder in images:
        with suppress(OSError, ValueError):
            promised += outstanding_in(str(folder))
    left_mb = max(0, free - reserve - promised) >> 20
    if left_mb < session_disk_mb:
        raise InsufficientResources(
            f"the disk of this host cannot hold a session of {session_disk_mb} MB (SESSION_DISK_MB): of {free >> 20} "
            f"MB free, {promised >> 20} MB are reserved for sessions and {reserve >> 20} MB for the host",
            details={"disk_asked_mb": session_disk_mb, "disk_left_mb": left_mb},
        )
