"""The promised and the actual size of the sparse images in a folder, for their creators and for admission.

<folder>/promised      bytes that the images there may grow to together, a number in text
<folder>/*.ext4        the images; `template.ext4` is none
"""

from __future__ import annotations

import os
from contextlib import suppress

PROMISED = "promised"
TEMPLATE = "template.ext4"
_RESERVED_SHARE, _RESERVED_MOST = 0.05, 4 << 30


def free_and_reserved(folder: str) -> tuple[int, int]:
    """Return the bytes that are free where a folder lies, and how many of them are kept for the host. Raises OSError.

    The databases, logs and archives of the platform are there too.
    """
    seen = os.statvfs(folder)
    return seen.f_bavail * seen.f_frsize, min(int(seen.f_blocks * seen.f_frsize * _RESERVED_SHARE), _RESERVED_MOST)


def promised_in(folder: str) -> int:
    """Return the bytes that images in a folder may grow to, 0 where none were made. Raises OSError or ValueError."""
    try:
        with open(os.path.join(folder, PROMISED)) as file:
            return int(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return 0


def on_disk(folder: str) -> int:
    """Return the bytes that images in a folder take of the host, 0 where there are none. Raises OSError."""
    taken = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(".ext4") and entry.name != TEMPLATE:
                    with suppress(FileNotFoundError):  # removed meanwhile, which takes nothing of the others away
                        taken += entry.stat(follow_symlinks=False).st_blocks * 512
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return taken


def outstanding_in(folder: str) -> int:
    """Return the bytes that images in a folder may still take of the host. Raises OSError or ValueError."""
    return max(0, promised_in(folder) - on_disk(folder))
