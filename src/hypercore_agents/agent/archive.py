"""A session's workspace, archived outside of the agent and brought back in another one.

The archive is a gzipped tar, made and unpacked by `tar` as the session's user inside its quarters: what a tool may have
put there (links, odd names, huge sparse files) meets no more rights than the session has. Its name is its SHA-256, so
an unchanged workspace is not sent again. GNU tar keeps members inside of the folder that it unpacks into. Its size, and
how many files and folders it has, are bounded where it is made and again where it is unpacked: what comes out of a
sandbox is not believed in the next one.
"""

import asyncio
import gzip
import hashlib
import os
import tarfile
import tempfile
from pathlib import Path
from typing import IO

from hypercore_agents.agent.gateway import Gateway
from hypercore_agents.agent.quarters import Quarters
from hypercore_agents.agent.workspace import SessionFolder
from hypercore_agents.api.errors import PayloadTooLarge

_CHUNK = 256 * 1024
_PACK = (
    "tar", "--create", "--file=-", "--sort=name", "--numeric-owner", "--owner=0", "--group=0", "--sparse",
    "--one-file-system", "--warning=none", "--ignore-failed-read", "--", ".",
)  # fmt: skip
_UNPACK = ("tar", "--extract", "--file=-", "--no-same-owner", "--no-same-permissions", "--warning=none")
_SECONDS = 120.0


class WorkspaceArchive:
    """One session's workspace. An archive is bounded before compression: `limit` in bytes, `entries` in files and
    folders; `spool` is a folder of ours."""

    def __init__(
        self,
        session_id: str,
        folder: SessionFolder,
        quarters: Quarters,
        gateway: Gateway,
        *,
        spool: Path | None,
        limit: int,
        entries: int,
    ) -> None:
        self.folder = folder
        self.digest: str | None = None
        """Of what is archived now."""
        self.restless = False
        """Whether a tool that could leave something running was called since the last look at what runs."""
        self._changes = self._archived = 0
        self._saving = asyncio.Lock()
        self._session_id = session_id
        self._quarters = quarters
        self._gateway = gateway
        self._spool = spool
        self._limit = limit
        self._entries = entries

    @property
    def changed(self) -> bool:
        """Whether something may have changed since what is archived; so it is until an archive of it is stored."""
        return self._changes != self._archived

    def note_change(self) -> None:
        """Note that something may have changed: an archive that is being made now may not have it."""
        self._changes += 1

    async def save(self, generation: int, *, unless_unchanged: bool = False) -> None:
        """Archive the workspace; what is stored already is not sent again. Raises HypercoreError, OSError,
        TimeoutError.

        `unless_unchanged`: do not even look when nothing is known to have changed.
        """
        async with self._saving:  # or an older state could be noted after a newer one
            if unless_unchanged and not self.changed:
                return  # somebody's archive of a moment ago has it
            changes = self._changes  # what changes from here on may be missing in this archive
            await self._save(generation)
            self._archived = changes

    async def _save(self, generation: int) -> None:
        with tempfile.TemporaryFile(dir=self._spool) as plain, tempfile.TemporaryFile(dir=self._spool) as packed:
            status = await self._quarters.run_as(self.folder, _PACK, stdout=plain.fileno(), timeout=_SECONDS)
            size = os.fstat(plain.fileno()).st_size
            if size > self._limit:
                raise PayloadTooLarge(
                    f"the workspace has {size} bytes and may have {self._limit} to be archived (WORKSPACE_MAX_MB)"
                )
            if status not in (0, 1):  # 1: a file changed while it was read
                raise OSError(f"tar ended with status {status}")
            if await asyncio.to_thread(_count, plain, self._entries) > self._entries:
                raise PayloadTooLarge(
                    f"the workspace has more than {self._entries} files and folders, too many to be archived "
                    "(WORKSPACE_MAX_FILES)"
                )
            digest = await asyncio.to_thread(_pack, plain, packed)
            if digest != self.digest:
                await self._gateway.put_workspace(self._session_id, generation, digest, packed)
            self.digest = digest

    async def restore(self, generation: int, digest: str) -> None:
        """Bring an archived workspace back. Raises HypercoreError, OSError or TimeoutError."""
        with tempfile.TemporaryFile(dir=self._spool) as packed, tempfile.TemporaryFile(dir=self._spool) as plain:
            seen = hashlib.sha256()
            async for chunk in self._gateway.get_workspace(self._session_id, generation, digest):
                seen.update(chunk)
                packed.write(chunk)
            if seen.hexdigest() != digest:
                raise OSError("the archive is not the one that was asked for")
            await asyncio.to_thread(_unpack, packed, plain, self._limit)
            if await asyncio.to_thread(_count, plain, self._entries) > self._entries:
                raise OSError(f"the archive has more than {self._entries} files and folders")
            os.lseek(plain.fileno(), 0, os.SEEK_SET)  # where tar, which gets the descriptor, begins to read
            status = await self._quarters.run_as(self.folder, _UNPACK, stdin=plain.fileno(), timeout=_SECONDS)
            if status != 0:
                raise OSError(f"tar ended with status {status}")
        self.digest = digest


def _pack(plain: IO[bytes], packed: IO[bytes]) -> str:
    """Compress; return the result's SHA-256."""
    plain.seek(0)
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1, mtime=0, filename="") as out:
        while chunk := plain.read(_CHUNK):
            out.write(chunk)
    packed.seek(0)
    return hashlib.file_digest(packed, "sha256").hexdigest()  # type: ignore[arg-type]


def _unpack(packed: IO[bytes], plain: IO[bytes], limit: int) -> None:
    packed.seek(0)
    size = 0
    with gzip.GzipFile(fileobj=packed, mode="rb") as source:
        while chunk := source.read(_CHUNK):
            size += len(chunk)
            if size > limit:
                raise OSError(f"the archive has more than {limit} bytes")
            plain.write(chunk)
    plain.flush()


def _count(plain: IO[bytes], most: int) -> int:
    """Return how many entries a tar has, its root not counted, but no more than one past `most`. Raises OSError."""
    plain.seek(0)
    entries = 0
    try:
        with tarfile.open(fileobj=plain, mode="r:") as archive:
            while entries <= most and (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # or it would remember them all
                entries += member.name != "."
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise OSError(f"this is no tar: {error}") from None
    return entries
