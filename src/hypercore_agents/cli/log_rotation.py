"""Rotation of `up.log`, which `up` and its child processes write through one inherited descriptor.

Rotation copies the file and truncates it in place, because the children keep their descriptor. They write in append
mode, so the next line starts at offset 0. Lines written between the copy and the truncation (microseconds, once per
`LIMIT` bytes) are lost.
"""

import asyncio
import contextlib
import os
import shutil
from pathlib import Path

LIMIT = 32 * 1024 * 1024
"""Size in bytes at which the file is rotated."""
RETAINED = 2
"""Number of rotated files: `up.log.1` and `up.log.2`."""
_CHECK_SECONDS = 5.0


async def keep_rotating(log: Path, *, descriptor: int = 2) -> None:
    """Rotate the log periodically until cancelled; return at once if `descriptor` does not refer to it."""
    if not _is(descriptor, log):
        return
    while True:
        with contextlib.suppress(OSError):  # a full disk: the log remains as it is
            if os.fstat(descriptor).st_size > LIMIT:
                await asyncio.to_thread(rotate, log)
        await asyncio.sleep(_CHECK_SECONDS)


def rotate(log: Path) -> None:
    """Copy a log to `NAME.1` and truncate it. Raises OSError, in which case nothing has changed."""
    older = [log.with_name(f"{log.name}.{number}") for number in range(1, RETAINED + 1)]
    copy = log.with_name(f"{log.name}.new")
    try:
        with open(log, "rb") as source, open(copy, "wb", opener=_private) as output:
            shutil.copyfileobj(source, output, 1024 * 1024)
            output.flush()
            while rest := source.read(1024 * 1024):  # lines written during the copy
                output.write(rest)
                output.flush()
            os.truncate(log, 0)
    except OSError:
        copy.unlink(missing_ok=True)
        raise
    for newer, target in reversed(list(zip([copy, *older], older, strict=False))):
        with contextlib.suppress(FileNotFoundError):
            newer.replace(target)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
