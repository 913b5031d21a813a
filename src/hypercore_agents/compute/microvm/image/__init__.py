"""The guest image: a read-only root, a kernel and an initramfs, built once and shared by every VM."""

from hypercore_agents.compute.microvm.image.images import Image, ImageError, build, find, folder_for, prune, verify

__all__ = ["Image", "ImageError", "build", "find", "folder_for", "prune", "verify"]
