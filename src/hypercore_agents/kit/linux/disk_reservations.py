"""Disk space that sparse images in a folder may use and do use; for creating images and for admitting new ones.

<folder>/promised      maximum total size of the images in bytes, a number as text
<folder>/*.ext4        the images, except for `template.ext4`
"""

from __future__ import annotations

import os
from contextlib import suppress

PROMISED = "promised"
TEMPLATE = "template.ext4"
_RESERVED_SHARE, _RESERVED_MAX = 0.05, 4 << 30


def free_and_reserved(folder: str) -> tuple[int, int]:
    """Return the free bytes of a folder's file system, and how many of them are reserved for the host. Raises OSError.

    The databases, logs and archives of the platform are on the same file system.
    """
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize, min(int(space.f_blocks * space.f_frsize * _RESERVED_SHARE), _RESERVED_MAX)


def promised_in(folder: str) -> int:
    """Return the maximum total size of a folder's images, 0 if there are none. Raises OSError or ValueError."""
    try:
        with open(os.path.join(folder, PROMISED)) as file:
            return int(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return 0


def on_disk(folder: str) -> int:
    """Return the bytes that a folder's images use on disk, 0 if there are none. Raises OSError."""
    used = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(".ext4") and entry.name != TEMPLATE:
                    with suppress(FileNotFoundError):  # removed concurrently
                        used += entry.stat(follow_symlinks=False).st_blocks * 512
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return used


def outstanding_in(folder: str) -> int:
    """Return the bytes that a folder's images may still use in addition. Raises OSError or ValueError."""
    return max(0, promised_in(folder) - on_disk(folder))
