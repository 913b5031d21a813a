"""Selects how sessions' files are limited on this host: by the kernel if possible, else by a scan."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from hypercore_agents.agent.launcher import kernel
from hypercore_agents.agent.launcher.disk_images import ImageStorage
from hypercore_agents.agent.launcher.quotas import QuotaStorage, UserQuotas
from hypercore_agents.agent.launcher.storage import Storage, describe
from hypercore_agents.kit.linux.removal import remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

METHODS = ("image", "quota", "scan")
_PROBE_MB, _PROBE_FILES = 16, 1000


def choose(allowed: Sequence[str], state: str, limit_mb: int, files: int, siblings: str | None) -> Storage:
    """Return the first of the allowed methods that works for a state folder; if none works, the scan.

    The process must be in its own mount namespace.
    """
    failures = []
    for method in allowed:
        try:
            if method == "image":
                images = ImageStorage(state, limit_mb, files, siblings)
                images.probe()
                return images
            if method == "quota":
                quotas = UserQuotas(state)
                if not quotas.enforced():
                    raise OSError("the file system enforces no user quotas")
                return QuotaStorage(state, limit_mb, files, quotas)
        except (OSError, subprocess.SubprocessError) as error:
            failures.append(f"{method}: {error}")
    return Storage("; ".join(failures) or "no other method was allowed")


def probe(state: str | None) -> str:
    """Return a sentence on how sessions' files would be limited in a folder (None: in the system's temporary one).

    Call it in a dedicated process: it moves the process into another mount namespace. Blocks for some milliseconds.
    """
    folder = tempfile.mkdtemp(prefix="hypercore-probe-", dir=state)
    try:
        kernel.enter_mount_namespace()
        storage = choose(METHODS, folder, _PROBE_MB, _PROBE_FILES, None)
        return describe(storage.method, storage.reason)
    finally:
        remove_tree(Path(folder))
