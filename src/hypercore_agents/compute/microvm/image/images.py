"""Finding, verifying and removing images. Building is `builder.py`'s.

A folder of images holds `images/IMAGE_ID/` (complete images: a name that exists is complete, since it is renamed into
place), `layers/` (what builds reuse) and `.building-*` (what an interrupted build left; the next one removes it).

An image is **current** when its inputs that are known in advance (recipe, locked requirements, this package's sources)
are those of this installation; `find` returns no other, so a guest never runs code older than the host's.
Rejected: a tag `latest` (it would say nothing about what is inside).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypercore_agents.compute.base import SandboxError

FILES = ("root.squashfs", "vmlinuz", "initrd", "busybox")
"""What an image consists of, apart from its manifest."""
_SHARED = Path("/var/lib/hypercore-agents/images")


class ImageError(SandboxError):
    """An image cannot be built or used; the message says why and what to do."""


@dataclass(frozen=True)
class Image:
    """A complete image. `image_id` names its content: two folders with the same id hold the same bytes of input."""

    folder: Path
    image_id: str
    inputs_id: str
    created_at: float

    @property
    def root(self) -> Path:
        """Squashfs with the guest's read-only root; all VMs share it."""
        return self.folder / "root.squashfs"

    @property
    def kernel(self) -> Path:
        """Linux, for QEMU's `-kernel`."""
        return self.folder / "vmlinuz"

    @property
    def busybox(self) -> Path:
        """The static busybox of the initramfs, from which the accelerator's probe makes its own."""
        return self.folder / "busybox"

    @property
    def initrd(self) -> Path:
        """Initramfs that mounts root and scratch disk and starts pid 1."""
        return self.folder / "initrd"

    def manifest(self) -> dict[str, Any]:
        """Return what the image was made of."""
        manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        return manifest

    def skills(self) -> list[str]:
        """Return the names of the operator's skills in the image."""
        found = self.manifest().get("skills")
        return sorted(found) if isinstance(found, dict) else []

    def size_bytes(self) -> int:
        """Return what the image takes on disk."""
        return sum((self.folder / name).stat().st_blocks * 512 for name in FILES)


def folder_for(state_dir: Path) -> Path:
    """Return where images live: HYPERCORE_IMAGE_DIR, else one folder per machine for root, else below `state_dir`."""
    given = os.environ.get("HYPERCORE_IMAGE_DIR")
    if given:
        return Path(given)
    return _SHARED if os.geteuid() == 0 else state_dir / "images"


def listing(state_dir: Path) -> list[Image]:
    """Return all complete images, newest first."""
    return listing_in(folder_for(state_dir))


def listing_in(folder: Path) -> list[Image]:
    """Return all complete images of a folder of images, newest first."""
    found = []
    for path in (folder / "images").glob("*/manifest.json"):
        try:
            manifest = json.loads(path.read_text())
            found.append(Image(path.parent, manifest["image_id"], manifest["inputs_id"], float(manifest["created_at"])))
        except (OSError, ValueError, KeyError):
            continue  # removed meanwhile, or not ours
    return sorted(found, key=lambda image: image.created_at, reverse=True)


def find(state_dir: Path) -> Image | None:
    """Return the newest image that was made from this installation's inputs, None when there is none yet."""
    from hypercore_agents.compute.microvm.image.inputs import inputs_id
    from hypercore_agents.compute.microvm.image.skills import skills_id

    wanted = inputs_id(skills_id(folder_for(state_dir) / "skills"))
    return next((image for image in listing(state_dir) if image.inputs_id == wanted), None)


def build(
    state_dir: Path,
    progress: Callable[[str], None] = lambda _: None,
    *,
    refresh: bool = False,
    skills: Path | None = None,
) -> Image:
    """Return the current image, building what is missing; `progress` gets a line per step. Blocking, minutes at worst.

    `refresh` fetches Debian's packages anew, for their security updates. `skills`: the operator's from now on, None: as
    they were. Raises ImageError; nothing half-made is left.
    """
    from hypercore_agents.compute.microvm.image.builder import build_image

    if not refresh and skills is None:
        image = find(state_dir)
        if image is not None:
            return image
    return build_image(folder_for(state_dir), progress, refresh=refresh, skills=skills)


def verify(image: Image) -> list[str]:
    """Return what is wrong with an image, nothing when its files are those of its manifest. Reads all of it."""
    try:
        expected = image.manifest()["files"]
    except (OSError, ValueError, KeyError):
        return ["manifest.json cannot be read"]
    faults = []
    for name in FILES:
        try:
            with (image.folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            faults.append(f"{name}: {error.strerror}")
            continue
        if digest != expected.get(name):
            faults.append(f"{name} is not what was built")
    return faults


def prune(state_dir: Path, *, keep: frozenset[str] = frozenset()) -> list[str]:
    """Remove images that are neither current nor in `keep` (ids in use), and layers that nothing needs; say which."""
    from hypercore_agents.compute.microvm.image.builder import prune_layers

    current = find(state_dir)
    removed = []
    for image in listing(state_dir):
        if image.image_id in keep or (current is not None and image.image_id == current.image_id):
            continue
        discard(image)
        removed.append(image.image_id)
    removed += prune_layers(folder_for(state_dir))
    return removed


def discard(image: Image) -> None:
    """Remove an image. A VM that runs goes on: it holds its files open."""
    (image.folder / "manifest.json").unlink(missing_ok=True)  # from here on it is no image any more
    shutil.rmtree(image.folder, ignore_errors=True)
