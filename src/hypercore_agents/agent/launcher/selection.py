"""Chooses how sessions' files are limited here: what the kernel counts where it can, a scan where it cannot."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from hypercore_agents.agent.launcher import kernel
from hypercore_agents.agent.launcher.disk_images import Images
from hypercore_agents.agent.launcher.quotas import Quotas, UserQuotas
from hypercore_agents.agent.launcher.storage import Storage, describe
from hypercore_agents.kit.linux.removal import remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

METHODS = ("image", "quota", "scan")
_PROBED_MB, _PROBED_FILES = 16, 1000


def choose(allowed: Sequence[str], state: str, limit_mb: int, files: int, siblings: str | None) -> Storage:
    """Return the first of the allowed methods that works for a state folder. It must be in a mount namespace of ours.

    The scan always works; it is what is left even where it is not allowed.
    """
    missing = []
    for method in allowed:
        try:
            if method == "image":
                images = Images(state, limit_mb, files, siblings)
                images.probe()
                return images
            if method == "quota":
                quotas = UserQuotas(state)
                if not quotas.enforced():
                    raise OSError("the file system enforces no user quotas")
                return Quotas(state, limit_mb, files, quotas)
        except (OSError, subprocess.SubprocessError) as error:
            missing.append(f"{method}: {error}")
    return Storage("; ".join(missing) or "nothing else was allowed")


def probe(state: str | None) -> str:
    """Return, for people, how sessions' files would be limited in a folder (None: in the system's for temporary files).

    For a process of its own: it leaves this process in another mount namespace. Blocks some milliseconds.
    """
    folder = tempfile.mkdtemp(prefix="hypercore-probe-", dir=state)
    try:
        kernel.own_mounts()
        storage = choose(METHODS, folder, _PROBED_MB, _PROBED_FILES, None)
        return describe(storage.method, storage.why)
    finally:
        remove_tree(Path(folder))
