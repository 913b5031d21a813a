"""A complete image: its files, its manifest, and the check that both still match."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = ("root.squashfs", "vmlinuz", "initrd", "busybox")
"""The files of an image, apart from its manifest."""


@dataclass(frozen=True)
class Image:
    """A complete image. `image_id` names its content: two images with the same id were built from the same inputs."""

    folder: Path
    image_id: str
    inputs_id: str
    created_at: float

    @property
    def root(self) -> Path:
        """The guest's read-only root as a squashfs file; all VMs share it."""
        return self.folder / "root.squashfs"

    @property
    def kernel(self) -> Path:
        """The Linux kernel, for QEMU's `-kernel`."""
        return self.folder / "vmlinuz"

    @property
    def busybox(self) -> Path:
        """The static busybox of the initramfs; the accelerator's probe builds its own initramfs from it."""
        return self.folder / "busybox"

    @property
    def initrd(self) -> Path:
        """The initramfs, which mounts the root and starts pid 1."""
        return self.folder / "initrd"

    def manifest(self) -> dict[str, Any]:
        """Return the image's inputs, versions and file hashes."""
        manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        return manifest

    def skills(self) -> list[str]:
        """Return the names of the operator's skills in the image."""
        found = self.manifest().get("skills")
        return sorted(found) if isinstance(found, dict) else []

    def size_bytes(self) -> int:
        """Return the disk space that the image takes."""
        return sum((self.folder / name).stat().st_blocks * 512 for name in FILES)


def verify(image: Image) -> list[str]:
    """Return the differences between an image's files and its manifest; empty if there are none. Reads every file."""
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
            faults.append(f"{name} differs from what was built")
    return faults
