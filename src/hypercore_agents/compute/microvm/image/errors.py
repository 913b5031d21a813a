"""The error that building, finding and using an image raises."""

from hypercore_agents.compute.base import SandboxError


class ImageError(SandboxError):
    """An image cannot be built or used. The message gives the reason and the remedy."""
