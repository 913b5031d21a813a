"""List folders in use: files that vanish meanwhile (locks of the CLI, SQLite files) are skipped.

`Path.rglob` fails if a folder is removed between its listing and the visit.
"""

import os
from collections.abc import Iterator
from pathlib import Path


def entries_below(folder: Path) -> Iterator[Path]:
    """Yield every file and folder below a folder that exists when it is visited."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            yield Path(parent, name)


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every regular file below a folder, links to files included."""
    return (path for path in entries_below(folder) if path.is_file())


def content_of(path: Path) -> bytes:
    """Return the content of a file; empty if it no longer exists."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
