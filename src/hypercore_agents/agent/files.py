"""Files in and out of a session's workspace.

Everything is done by small programs that run as the session, in its quarters: what a tool may have put there (links,
odd names, pipes) meets no more rights than the session has. Where a path leads is resolved first, links included, and
must be inside of the workspace. A tool that swaps a link between the look and the read gains nothing that it could not
read itself.
"""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path
from typing import IO, Literal

from hypercore_agents.agent.disk_space import full_disk
from hypercore_agents.agent.quarters import Quarters
from hypercore_agents.agent.workspace import SessionFolder
from hypercore_agents.api.errors import Forbidden, InvalidRequest, NotFound, PayloadTooLarge, Unavailable
from hypercore_agents.api.files import MOST_ENTRIES, READ_LIMIT, WRITE_LIMIT, FileEntry

_SECONDS = 60.0
_CHUNK = 256 * 1024
_LISTING_BYTES = 2 * 1024 * 1024
_OUTSIDE, _MISSING, _NO_FILE, _TOO_LARGE = 64, 65, 66, 67

_INSIDE = 'cd -- "$1" && w=$(pwd -P) && p=$(realpath -m -- "$2") && case $p in "$w"/*) ;; *) exit 64 ;; esac; '
_READ = _INSIDE + (
    '[ -e "$p" ] || exit 65; [ -f "$p" ] || exit 66; [ "$(stat -c %s -- "$p")" -le "$3" ] || exit 67; exec cat -- "$p"'
)
_WRITE = _INSIDE + (
    '[ ! -e "$p" ] || [ -f "$p" ] || exit 66; d=${p%/*}; mkdir -p -- "$d" && t=$(mktemp -- "$d/.incoming.XXXXXX") && '
    '{ cat > "$t" && chmod 644 -- "$t" && mv -fT -- "$t" "$p" || { rm -f -- "$t"; exit 1; }; }'
)
_LIST = 'cd -- "$1" && find . -mindepth 1 -printf "%y\\t%s\\t%T@\\t%P\\0" | head -c "$3"'
_TYPES: dict[str, Literal["file", "folder"]] = {"f": "file", "d": "folder"}


class WorkspaceFiles:
    """Reads and writes in sessions' workspaces. `spool` is our folder for what is on its way; None: the system's."""

    def __init__(self, quarters: Quarters, spool: Path | None = None) -> None:
        self._quarters = quarters
        self._spool = spool

    async def read(self, folder: SessionFolder, path: str) -> IO[bytes]:
        """Return a copy of a file, to be closed by the caller. Raises domain errors."""
        copy = tempfile.TemporaryFile(dir=self._spool)  # noqa: SIM115  the caller closes it
        try:
            await self._run(folder, _READ, path, READ_LIMIT, stdout=copy.fileno())
            if os.fstat(copy.fileno()).st_size > READ_LIMIT:
                raise PayloadTooLarge(f"the file is larger than {READ_LIMIT} bytes")
            copy.seek(0)
        except BaseException:
            copy.close()
            raise
        return copy

    async def write(self, folder: SessionFolder, path: str, body: AsyncIterable[bytes]) -> int:
        """Put a file in the place of the one there was, folders made on the way; return its size."""
        with tempfile.TemporaryFile(dir=self._spool) as incoming:
            size = 0
            async for chunk in body:
                size += len(chunk)
                if size > WRITE_LIMIT:
                    raise PayloadTooLarge(
                        f"the file is larger than {WRITE_LIMIT} bytes", details={"limit_bytes": WRITE_LIMIT}
                    )
                await asyncio.to_thread(incoming.write, chunk)
            incoming.seek(0)
            await self._run(folder, _WRITE, path, WRITE_LIMIT, stdin=incoming.fileno())
        return size

    async def list(self, folder: SessionFolder) -> tuple[list[FileEntry], bool]:
        """Return what is in a workspace, and whether there is more."""
        with tempfile.TemporaryFile(dir=self._spool) as listing:
            await self._run(folder, _LIST, ".", _LISTING_BYTES, stdout=listing.fileno())
            listing.seek(0)
            raw = listing.read(_LISTING_BYTES)
        whole, _, rest = raw.rpartition(b"\0")
        entries = [_entry(line) for line in whole.split(b"\0")[: MOST_ENTRIES + 1] if line]
        return entries[:MOST_ENTRIES], bool(rest) or len(entries) > MOST_ENTRIES

    async def _run(
        self,
        folder: SessionFolder,
        script: str,
        path: str,
        limit: int,
        *,
        stdin: int | None = None,
        stdout: int | None = None,
    ) -> None:
        if ".." in path.split("/"):
            raise InvalidRequest("path: must not have .. in it", field="path")
        await self._quarters.prepare(folder)
        argv = ("sh", "-c", script, "sh", str(folder.workspace), path, str(limit))
        try:
            status = await self._quarters.run_as(folder, argv, stdin=stdin, stdout=stdout, timeout=_SECONDS)
        except TimeoutError:
            raise Unavailable("the workspace did not answer in time; try again", retry_after=5) from None
        if status == _OUTSIDE:
            raise Forbidden(f"{path[:200]!r} leads out of the workspace")
        if status == _MISSING:
            raise NotFound(f"there is no file {path[:200]!r} in the workspace")
        if status == _NO_FILE:
            raise InvalidRequest(f"path: {path[:200]!r} is no regular file", field="path")
        if status == _TOO_LARGE:
            raise PayloadTooLarge(f"the file is larger than {limit} bytes", details={"limit_bytes": limit})
        if status != 0:
            if (full := await full_disk(self._quarters, folder)) is not None:
                raise PayloadTooLarge(full)
            raise Unavailable("the workspace could not be read or written; it may be full")


async def pieces(file: IO[bytes]) -> AsyncIterator[bytes]:
    """Yield a file's bytes and close it."""
    with file:
        while chunk := await asyncio.to_thread(file.read, _CHUNK):
            yield chunk


def _entry(line: bytes) -> FileEntry:
    kind, size, modified, path = line.decode(errors="replace").split("\t", 3)
    return FileEntry(path=path, type=_TYPES.get(kind, "other"), size=int(size), modified_at=float(modified))
