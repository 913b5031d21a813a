"""What this backend refuses to start, with the field and the remedy."""

from hypercore_agents.compute.base import SandboxRequest
from hypercore_agents.compute.host import admission
from hypercore_agents.compute.host.admission import refuse
from hypercore_agents.compute.process.launch import RESERVED_NAMES

_ENVIRONMENT_BYTES = 64 * 1024


def check(request: SandboxRequest) -> None:
    """Raise SandboxRefused for what can never be started here."""
    if request.gpu_quota_mb:
        refuse("gpu_quota", "the process backend has no GPU quotas; leave it out or give 0")
    if request.image is not None:
        refuse("image", "the process backend has no images: agents run this installation; leave it out")
    admission.check(request, reserved_names=RESERVED_NAMES, environment_bytes=_ENVIRONMENT_BYTES)
