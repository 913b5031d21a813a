"""Blobs: workspaces' archives, in a folder or in S3 (`BLOB_URL`), through obstore.

A blob is named by its owner and its content's SHA-256, so it is written once and never changes. It is complete or not
there: what is being uploaded has another name until its digest is known to be right. What a crash left under such a
name is swept away by its age. Parts of an upload that S3 never put together are the bucket's to clean up (a lifecycle
rule, AbortIncompleteMultipartUpload).
"""

import asyncio
import hashlib
import re
import time
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import obstore
import structlog
from obstore.store import LocalStore, from_url

from hypercore_agents.api.errors import HypercoreError, InvalidRequest, PayloadTooLarge, Unavailable
from hypercore_agents.kit.environment import SettingError

_log = structlog.get_logger(__name__)
_INCOMING = "incoming"
_URL = re.compile(r"file:///[^\0]*|s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\s?#\0]*)?")
_PART_BYTES, _PARTS_AT_ONCE = 5 << 20, 2
"""Memory of one upload: S3 takes parts of 5 MB and more."""
_PIECE_BYTES = 256 * 1024


class StoredBlob(NamedTuple):
    """A blob that was written: its SHA-256 and its size in bytes."""

    digest: str
    size: int


class BlobUrlError(SettingError):
    """`BLOB_URL` cannot be used; the message says why."""


class Blobs:
    """The blob store of one process. All methods raise Unavailable when it does not answer."""

    def __init__(self, url: str | None, folder: Path) -> None:
        if url is not None and not _URL.fullmatch(url):
            raise BlobUrlError("BLOB_URL must be s3://BUCKET, s3://BUCKET/PREFIX or file:///PATH")
        if url is not None and url.startswith("file://"):
            folder, url = Path(url.removeprefix("file://")), None
        self._folder = folder if url is None else None
        if url is None:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise BlobUrlError(
                    f"BLOB_URL: cannot make the folder {folder}: {error.strerror}; set BLOB_URL or STATE_DIR to another"
                ) from None
            self._store: Any = LocalStore(folder)
            return
        try:
            self._store = from_url(url)
        except Exception as error:
            raise BlobUrlError(
                f"BLOB_URL cannot be used: {type(error).__name__}; use s3://BUCKET or file:///PATH"
            ) from None

    async def put(
        self, owner: str, chunks: AsyncIterator[bytes], *, limit: int, digest: str | None = None
    ) -> StoredBlob:
        """Write a blob as it comes. Raises InvalidRequest when its digest is not `digest`, PayloadTooLarge, and what
        `chunks` raises."""
        incoming = f"{_INCOMING}/{uuid.uuid4().hex}"
        seen = hashlib.sha256()
        size = 0
        cut: Exception | None = None

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size, cut
            try:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > limit:
                        raise PayloadTooLarge(
                            f"the archive is larger than {limit} bytes (WORKSPACE_MAX_MB)",
                            details={"limit_bytes": limit},
                        )
                    seen.update(chunk)
                    yield chunk
            except Exception as error:
                cut = error
                raise

        try:
            await obstore.put_async(
                self._store, incoming, counted(), chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE
            )
            found = seen.hexdigest()
            if digest is not None and found != digest:
                await obstore.delete_async(self._store, incoming)
                raise InvalidRequest("the archive's SHA-256 is not the one that was announced", field="digest")
            await obstore.rename_async(self._store, incoming, _name(owner, found))
        except HypercoreError:
            raise
        except Exception as error:
            if cut is not None:  # whoever sends it is to blame, not the store
                raise cut from None
            raise _unavailable(error) from error
        return StoredBlob(found, size)

    async def get(self, owner: str, digest: str) -> AsyncIterator[bytes]:
        """Give a blob's bytes."""
        try:
            found = await obstore.get_async(self._store, _name(owner, digest))
            async for chunk in found.stream(min_chunk_size=_PIECE_BYTES):
                yield bytes(chunk)
        except Exception as error:
            raise _unavailable(error) from error

    async def has(self, owner: str, digest: str) -> bool:
        """Say whether a blob is there."""
        try:
            await obstore.head_async(self._store, _name(owner, digest))
        except FileNotFoundError:
            return False
        except Exception as error:
            raise _unavailable(error) from error
        return True

    async def delete(self, owner: str, digest: str) -> None:
        """Delete a blob; one that is not there is deleted already."""
        try:
            await obstore.delete_async(self._store, _name(owner, digest))
        except FileNotFoundError:
            return
        except Exception as error:
            raise _unavailable(error) from error

    async def sweep(self, age: float) -> int:
        """Delete what began to be uploaded more than `age` seconds ago and never ended; return how many there were."""
        if self._folder is not None:
            # Not through the store: it does not list what it had only begun to write.
            return await asyncio.to_thread(_sweep, self._folder / _INCOMING, time.time() - age)
        before = datetime.now(UTC) - timedelta(seconds=age)
        try:
            old = [
                str(found["path"])
                async for batch in obstore.list(self._store, _INCOMING)
                for found in batch
                if found["last_modified"] < before
            ]
            if old:
                await obstore.delete_async(self._store, old)
        except Exception as error:
            raise _unavailable(error) from error
        return len(old)


def _sweep(folder: Path, before: float) -> int:
    swept = 0
    for path in folder.glob("*"):
        try:
            if path.lstat().st_mtime < before:
                path.unlink()
                swept += 1
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                raise _unavailable(error) from error
    return swept


def owner_of(user_id: str) -> str:
    """Return the folder of a user's blobs."""
    return hashlib.sha256(user_id.encode()).hexdigest()


def _name(owner: str, digest: str) -> str:
    return f"workspaces/{owner}/{digest}"


def _unavailable(error: Exception) -> Unavailable:
    _log.error("blobs.failed", error=str(error)[:300])
    return Unavailable("the blob store does not answer; try again, and see the server's log")
