"""The guest image: a read-only root file system, a kernel and an initramfs, built once and shared by all VMs.

- `inputs`      what an image is built from, and the hashes that name it
- `errors`      `ImageError`
- `built_image` one complete image, and its verification
- `images`      the folder of images: list, find, remove
- `skills`      the operator's skills in an image
- `commands`    running the programs of a build
- `layers`      the parts that later builds reuse
- `initramfs`   the archive that mounts the root and starts pid 1
- `builder`     builds and prunes images
"""

from hypercore_agents.compute.microvm.image.builder import build, prune
from hypercore_agents.compute.microvm.image.built_image import Image, verify
from hypercore_agents.compute.microvm.image.errors import ImageError
from hypercore_agents.compute.microvm.image.images import find, folder_for

__all__ = ["Image", "ImageError", "build", "find", "folder_for", "prune", "verify"]
