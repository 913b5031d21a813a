"""The inputs of an image, as far as they are known before a build, and the hashes that name them.

An image has three layers. Each is named by a hash of its inputs, so a change rebuilds only what depends on it:

- **base**: Debian's packages and the kernel (takes minutes),
- **site**: the locked Python requirements, including the Agent SDK with its CLI (seconds),
- **package**: the source files of this installation (immediate).
"""

import hashlib
import json
from pathlib import Path

import hypercore_agents

SUITE = "bookworm"
PYTHON = "3.11"
"""The suite's Python version. Wheels are selected for it, whichever version runs the build."""
PACKAGES = (
    "busybox-static", "ca-certificates", "git", "iproute2", "python3", "ripgrep", "util-linux",
)  # fmt: skip
KERNEL = "linux-image-cloud-amd64"
MODULES = (
    "virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "failover", "net_failover", "virtio_net", "virtio-rng",
    "virtio_console", "squashfs", "quota_tree", "quota_v2",
)  # fmt: skip
"""Kernel modules, in the order in which the initramfs loads them. ext4 is built in."""
RECIPE = 2
"""Version of the build steps: increase it when they change and no other input does."""

_PACKAGE = Path(hypercore_agents.__file__).parent


def lock_file() -> Path:
    """Return the file of locked requirements: in the wheel, or in the checkout of an editable installation."""
    inside = Path(__file__).with_name("runtime.lock")
    return inside if inside.exists() else _PACKAGE.parents[1] / "requirements" / "runtime.lock"


def source_files() -> list[Path]:
    """Return the files of this package, relative to its folder, in a fixed order."""
    return sorted(
        path.relative_to(_PACKAGE)
        for path in _PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in {".pyc", ".so"}
    )


def base_id() -> str:
    """Return the name of the layer of Debian's packages."""
    return _digest([RECIPE, SUITE, PACKAGES, KERNEL])


def site_id() -> str:
    """Return the name of the layer of Python requirements."""
    return _digest([RECIPE, SUITE, PYTHON, hashlib.sha256(lock_file().read_bytes()).hexdigest()])


def package_id() -> str:
    """Return the name of the current state of this package's sources."""
    digest = hashlib.sha256()
    for path in source_files():
        content = (_PACKAGE / path).read_bytes()
        digest.update(f"{path}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def inputs_id(skills: str | None = None) -> str:
    """Return the name of all inputs together: the same id means the same image, except for Debian's updates.

    `skills` is the name of the operator's skills (`skills.skills_id`).
    """
    return _digest([base_id(), site_id(), package_id(), MODULES, *([skills] if skills else [])])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
