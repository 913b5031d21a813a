"""Rotation of `up.log`, which `up` and its children write through one descriptor that they inherited.

The file is copied and emptied in its place, since no child would open another one. All of them append, so that what
they write next begins at its start. What is written between the last byte that was copied and the emptying is lost:
microseconds, once in `LIMIT` bytes.
"""

import asyncio
import contextlib
import os
import shutil
from pathlib import Path

LIMIT = 32 * 1024 * 1024
"""Bytes at which the file is rotated."""
KEPT = 2
"""Earlier files that are kept, as `up.log.1` and `up.log.2`."""
_LOOK_SECONDS = 5.0


async def keep_rotating(log: Path, *, descriptor: int = 2) -> None:
    """Rotate a log for as long as this runs; does nothing where `descriptor` does not write to it."""
    if not _is(descriptor, log):
        return
    while True:
        with contextlib.suppress(OSError):  # a full disk: what there is of the log stays
            if os.fstat(descriptor).st_size > LIMIT:
                await asyncio.to_thread(rotate, log)
        await asyncio.sleep(_LOOK_SECONDS)


def rotate(log: Path) -> None:
    """Keep what a log holds in a file beside it, and empty it. Raises OSError; then nothing has changed."""
    older = [log.with_name(f"{log.name}.{number}") for number in range(1, KEPT + 1)]
    fresh = log.with_name(f"{log.name}.new")
    try:
        with open(log, "rb") as source, open(fresh, "wb", opener=_private) as target:
            shutil.copyfileobj(source, target, 1024 * 1024)
            target.flush()
            while rest := source.read(1024 * 1024):  # what was written meanwhile
                target.write(rest)
                target.flush()
            os.truncate(log, 0)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    for newer, place in reversed(list(zip([fresh, *older], older, strict=False))):
        with contextlib.suppress(FileNotFoundError):
            newer.replace(place)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
