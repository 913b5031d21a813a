"""Open descriptors of processes, from /proc."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


def descriptors(pid: int | str = "self") -> Iterator[tuple[int, str]]:
    """Yield number and target of each descriptor that a process has open now.

    A descriptor that is closed meanwhile is skipped, such as the one with which this process reads the folder.
    """
    folder = Path(f"/proc/{pid}/fd")
    for entry in list(folder.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            yield int(entry.name), str(entry.readlink())


def descriptor_count(pid: int | str = "self") -> int:
    """Return how many descriptors a process has open now."""
    return len(list(descriptors(pid)))
