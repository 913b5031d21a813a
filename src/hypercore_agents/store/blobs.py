"""The blob store: workspace archives, in a folder or in S3 (`BLOB_URL`), through obstore.

A blob is named by its owner and the SHA-256 of its content, so it is written once and never changes. It is complete or
it does not exist: an upload has another name until its digest is verified. `sweep` deletes uploads that a crash left
behind, by their age. The parts of an S3 upload that was never completed are left to the bucket's lifecycle rule
(AbortIncompleteMultipartUpload).

S3 is configured by the variables in `AWS_VARIABLES`, from the environment or `.env`, or by the credentials of the
machine, container or web identity. A failed request is retried for a few seconds only, because a turn waits for it.
"""

import asyncio
import hashlib
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import obstore
import structlog
from obstore.exceptions import NotFoundError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, from_url

from hypercore_agents.api.errors import HypercoreError, InvalidRequest, PayloadTooLarge, Unavailable, readable_size
from hypercore_agents.kit.environment import SettingError, setting

_log = structlog.get_logger(__name__)
_INCOMING = "incoming"
_URL = re.compile(r"file:///[^\0]*|s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\s?#\0]*)?")
_PART_BYTES, _PARTS_AT_ONCE = 5 << 20, 2
"""Memory of one upload: S3 takes parts of 5 MB and more."""
_PIECE_BYTES = 256 * 1024


class StoredBlob(NamedTuple):
    """A stored blob: its SHA-256 and its size in bytes."""

    digest: str
    size: int


_PROBE, _PROBE_SECONDS = b"hypercore-agents", 10.0
_REFUSALS = (PermissionDeniedError, UnauthenticatedError, NotFoundError, PermissionError, FileNotFoundError)
AWS_VARIABLES = {
    "AWS_ACCESS_KEY_ID": "credentials for S3 (BLOB_URL=s3://...); unset: the machine's, container's or web identity's",
    "AWS_SECRET_ACCESS_KEY": "secret of AWS_ACCESS_KEY_ID",
    "AWS_SESSION_TOKEN": "session token of temporary credentials",
    "AWS_REGION": "region of the bucket",
    "AWS_ENDPOINT_URL": "URL of an S3 service other than Amazon's, e.g. https://minio.example.com:9000",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true: the bucket is part of the host name, not of the path",
    "AWS_ALLOW_HTTP": "true: allow an AWS_ENDPOINT_URL without TLS",
}
"""Variables that configure S3, with their descriptions."""


class BlobUrlError(SettingError):
    """`BLOB_URL` cannot be used; the message says why."""


class Blobs:
    """The blob store of one process. All methods raise Unavailable if it does not answer."""

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
                    f"BLOB_URL: cannot create the folder {folder}: {error.strerror}; change BLOB_URL or STATE_DIR"
                ) from None
            self._store: Any = LocalStore(folder)
            self._remedy = f"check the permissions of {folder}"
            return
        self._remedy = (
            "check bucket, region and permissions, AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
        self._store = _s3(url)

    async def require(self) -> None:
        """Check the store before serving.

        Raises BlobUrlError for permanent errors: credentials, permissions, a missing bucket. If the store does not
        answer, the error is only logged; `check` reports it later.
        """
        try:
            await self._probe()
        except _REFUSALS as error:
            raise BlobUrlError(
                f"BLOB_URL: the blob store rejects a test object: {_cause(error)}; {self._remedy}"
            ) from None
        except Exception as error:
            _log.error("blobs.unavailable", error=_cause(error))

    async def check(self) -> None:
        """Write, read and delete a small object. Raises Unavailable with the cause."""
        try:
            await self._probe()
        except Exception as error:
            raise Unavailable(f"the blob store does not accept a test object: {_cause(error)}") from error

    async def _probe(self) -> None:
        name = f"{_INCOMING}/probe-{uuid.uuid4().hex}"
        async with asyncio.timeout(_PROBE_SECONDS):
            await obstore.put_async(self._store, name, _PROBE)
            try:
                found = await obstore.get_async(self._store, name)
                if bytes(await found.bytes_async()) != _PROBE:
                    raise OSError("it returns other bytes than were written")
            finally:
                await obstore.delete_async(self._store, name)

    async def put(
        self,
        owner: str,
        chunks: AsyncIterator[bytes],
        *,
        limit: int,
        digest: str | None = None,
        before_naming: Callable[[str], Awaitable[None]] | None = None,
    ) -> StoredBlob:
        """Store a blob while its chunks arrive. `before_naming` is called with its digest before the blob is named.

        Raises InvalidRequest if its digest is not `digest`, PayloadTooLarge, and what `chunks` and `before_naming`
        raise.
        """
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
                            f"the archive is larger than {readable_size(limit)} (WORKSPACE_MAX_MB)",
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
                raise InvalidRequest("the archive's SHA-256 is not the one in the request", field="digest")
            if before_naming is not None:
                await before_naming(found)
            await obstore.rename_async(self._store, incoming, _name(owner, found))
        except HypercoreError:
            raise
        except Exception as error:
            if cut is not None:  # the sender failed, not the store
                raise cut from None
            raise _unavailable(error) from error
        return StoredBlob(found, size)

    async def get(self, owner: str, digest: str) -> AsyncIterator[bytes]:
        """Yield a blob's bytes."""
        try:
            found = await obstore.get_async(self._store, _name(owner, digest))
            async for chunk in found.stream(min_chunk_size=_PIECE_BYTES):
                yield bytes(chunk)
        except Exception as error:
            raise _unavailable(error) from error

    async def has(self, owner: str, digest: str) -> bool:
        """Return whether a blob exists."""
        try:
            await obstore.head_async(self._store, _name(owner, digest))
        except FileNotFoundError:
            return False
        except Exception as error:
            raise _unavailable(error) from error
        return True

    async def delete(self, owner: str, digest: str) -> None:
        """Delete a blob. Deleting a missing blob succeeds."""
        try:
            await obstore.delete_async(self._store, _name(owner, digest))
        except FileNotFoundError:
            return
        except Exception as error:
            raise _unavailable(error) from error

    async def sweep(self, age: float) -> int:
        """Delete incomplete uploads that are older than `age` seconds; return their number."""
        if self._folder is not None:
            # Not through the store, which does not list files that it has not completed.
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


def _s3(url: str) -> Any:
    given = {name: value for name in AWS_VARIABLES if (value := setting(name))}
    allow_http = given.pop("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")
    try:
        return from_url(
            url,
            config=given,  # type: ignore[call-overload]
            client_options={"allow_http": allow_http, "connect_timeout": "5s", "timeout": "30s"},
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=15)},
        )
    except Exception as error:
        raise BlobUrlError(f"BLOB_URL: {_cause(error)}; see AWS_REGION, AWS_ENDPOINT_URL") from None


def _cause(error: BaseException) -> str:
    """Return the store's error on one line: S3's code and message, if it sent them."""
    if isinstance(error, TimeoutError):
        return f"no answer within {_PROBE_SECONDS:.0f} s"
    text = " ".join(str(error).split())
    if sent := re.search(r"<Code>([^<]+)</Code>(?:.*?<Message>([^<]*)</Message>)?", text):
        return ": ".join(filter(None, sent.groups()))[:300]
    return text.split(" Debug source:")[0][:300] or type(error).__name__


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
    return Unavailable("the blob store does not answer; try again, and check the server's log")
