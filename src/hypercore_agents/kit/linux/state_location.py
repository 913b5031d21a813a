"""Identifies the machine and the state folder that a store or a sandbox belongs to.

Local backends keep sandboxes under `STATE_DIR` and find them by process ids, users and control groups of the machine.
So a store and each sandbox record contain their location. It reveals two machines on one store and copied state folders
before a sandbox is adopted or killed.

- The host is a digest of `/etc/machine-id` (machine-id(5) advises against revealing the id itself); empty on hosts
  without one, such as most containers.
- The folder is its path without links. A copy has another path.
- The folder id is random and stored in the folder. It distinguishes machines that were cloned from one image and share
  a machine id.

Rejected: the host name (changes with DHCP and with every container), the boot id (changes with every reboot), the
folder's inode (changes when a backup is restored in place).
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
    """A state folder on a host. `name` is the host name, for messages; comparisons ignore it."""

    host: str
    folder: str
    folder_id: str
    name: str

    @staticmethod
    def of(state_dir: Path) -> "StateLocation":
        """Return the location of a state folder; a folder without an id gets one.

        Raises OSError if the folder cannot be read or written.
        """
        return StateLocation(host_id(), str(state_dir.resolve()), _folder_id(state_dir), socket.gethostname())

    def difference_from(self, other: "StateLocation") -> str | None:
        """Return the name of the field in which two locations differ, None if they are the same."""
        if self.host != other.host:
            return "host"
        if self.folder != other.folder:
            return "folder"
        return None if self.folder_id == other.folder_id else "folder_id"


@cache
def host_id() -> str:
    """Return the identifier of this machine; empty if it has no machine id."""
    try:
        machine = _MACHINE_ID.read_text().strip()
    except OSError:
        return ""
    return hashlib.sha256(f"hypercore-agents/host/{machine}".encode()).hexdigest()[:16] if machine else ""


def location_mark(folder: Path) -> str:
    """Return the mark for records in this folder, which reveals copies of them elsewhere."""
    return f"{host_id()}:{folder.resolve()}"


def _folder_id(folder: Path) -> str:
    """Return a folder's id, created if necessary. Concurrent processes get the same one."""
    path = folder / _FOLDER_ID
    with suppress(FileNotFoundError):
        return path.read_text().strip()
    new = path.with_name(f".{_FOLDER_ID}.{secrets.token_hex(4)}")
    new.write_text(secrets.token_hex(_ID_CHARACTERS // 2))
    try:
        with suppress(FileExistsError):
            os.link(new, path)
    finally:
        new.unlink()
    return path.read_text().strip()
