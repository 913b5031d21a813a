"""What an image is made of, as far as it is known before it is built, and the hashes that name it.

Three layers, each named by a hash of its own inputs, so that a change redoes no more than it must:

- **base**: Debian's packages and the kernel (minutes),
- **site**: the locked Python requirements, the Agent SDK with its CLI among them (seconds),
- **package**: this installation's own source files (at once).
"""

import hashlib
import json
from pathlib import Path

import hypercore_agents

SUITE = "bookworm"
PYTHON = "3.11"
"""Python of that suite; wheels are chosen for it, whatever runs the build."""
PACKAGES = (
    "busybox-static", "ca-certificates", "git", "iproute2", "python3", "ripgrep", "util-linux",
)  # fmt: skip
KERNEL = "linux-image-cloud-amd64"
MODULES = (
    "virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "failover", "net_failover", "virtio_net", "virtio-rng",
    "virtio_console", "squashfs", "quota_tree", "quota_v2",
)  # fmt: skip
"""In the order in which the initramfs loads them. ext4 is built in."""
RECIPE = 2
"""Raised when the way of building changes without any other input's changing."""

_PACKAGE = Path(hypercore_agents.__file__).parent


def lock_file() -> Path:
    """Return the locked requirements: part of the wheel, or of the checkout that is installed in place."""
    inside = Path(__file__).with_name("runtime.lock")
    return inside if inside.exists() else _PACKAGE.parents[1] / "requirements" / "runtime.lock"


def source_files() -> list[Path]:
    """Return this package's files, relative to its folder, in a fixed order."""
    return sorted(
        path.relative_to(_PACKAGE)
        for path in _PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in {".pyc", ".so"}
    )


def base_id() -> str:
    """Name the layer of Debian's packages."""
    return _digest([RECIPE, SUITE, PACKAGES, KERNEL])


def site_id() -> str:
    """Name the layer of Python requirements."""
    return _digest([RECIPE, SUITE, PYTHON, hashlib.sha256(lock_file().read_bytes()).hexdigest()])


def package_id() -> str:
    """Name the state of this package's sources."""
    digest = hashlib.sha256()
    for path in source_files():
        content = (_PACKAGE / path).read_bytes()
        digest.update(f"{path}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def inputs_id(skills: str | None = None) -> str:
    """Name everything that is known in advance: the same id means the same image, but for Debian's own updates.

    `skills` names the operator's (`skills.py`).
    """
    return _digest([base_id(), site_id(), package_id(), MODULES, *([skills] if skills else [])])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
