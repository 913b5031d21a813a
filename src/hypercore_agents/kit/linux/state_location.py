"""Which machine and which state folder something belongs to.

Local backends keep sandboxes under `STATE_DIR` and find them again by process ids, users and control groups of this
machine. So a store, and each sandbox's record, names its origin: two machines on one store, or a copied state folder,
are recognised before anything is adopted or killed.

- The host is a digest of `/etc/machine-id` (machine-id(5) asks not to show the id itself); empty where there is none,
  as in most containers.
- The folder is its path without links. A copy has another path.
- The folder's id is random and kept in the folder. It tells machines apart that were cloned from one image, and so
  have one machine id.

Rejected: the host's name (it changes with DHCP and with every container), the boot id (every reboot), the folder's
inode (a backup that is restored in place has another one).
"""

import hashlib
import os
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_MACHINE_ID = Path("/etc/machine-id")
_FOLDER_ID = "folder-id"
_ID_CHARACTERS = 16


@dataclass(frozen=True)
class StateLocation:
    """A state folder on a host. `name` is the host's name, for people; it does not count in comparisons."""

    host: str
    folder: str
    folder_id: str
    name: str

    @staticmethod
    def of(state_dir: Path) -> "StateLocation":
        """Return the origin of what is kept in a state folder, which is given its id if it has none.

        Raises OSError when the folder cannot be read or written.
        """
        return StateLocation(host_id(), str(state_dir.resolve()), _folder_id(state_dir), socket.gethostname())

    def difference_from(self, other: "StateLocation") -> str | None:
        """Return in what two origins differ, None when they are the same one."""
        if self.host != other.host:
            return "host"
        if self.folder != other.folder:
            return "folder"
        return None if self.folder_id == other.folder_id else "folder_id"


@cache
def host_id() -> str:
    """Return what identifies this machine; empty where it has no machine id."""
    try:
        machine = _MACHINE_ID.read_text().strip()
    except OSError:
        return ""
    return hashlib.sha256(f"hypercore-agents/host/{machine}".encode()).hexdigest()[:16] if machine else ""


def location_mark(folder: Path) -> str:
    """Return what a record in this folder carries, so that a copy of it elsewhere is known as one."""
    return f"{host_id()}:{folder.resolve()}"


def _folder_id(folder: Path) -> str:
    """Return a folder's id. Of two processes that give it one at the same time, one wins."""
    path = folder / _FOLDER_ID
    with suppress(FileNotFoundError):
        return path.read_text().strip()
    fresh = path.with_name(f".{_FOLDER_ID}.{secrets.token_hex(4)}")
    fresh.write_text(secrets.token_hex(_ID_CHARACTERS // 2))
    try:
        with suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        fresh.unlink()
    return path.read_text().strip()
