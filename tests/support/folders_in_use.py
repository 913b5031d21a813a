"""Looking through folders in use: what goes meanwhile (a lock of the CLI, SQLite files) is passed over.

`Path.rglob` stumbles over a folder that is removed between its listing and its look.
"""

import os
from collections.abc import Iterator
from pathlib import Path


def entries_below(folder: Path) -> Iterator[Path]:
    """Give every file and folder below a folder, whichever are there when it is their turn."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            yield Path(parent, name)


def files_below(folder: Path) -> Iterator[Path]:
    """Give every regular file, and link to one, below a folder."""
    return (path for path in entries_below(folder) if path.is_file())


def content_of(path: Path) -> bytes:
    """Return what a file holds; nothing where it is gone."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
