"""Reads, writes, lists and deletes files of a session's workspace, streamed between the client and the session.

`launcher.workspace_files` does all work with the session's rights, so links, odd names or pipes that a tool created
gain no rights beyond the session's. The server stores no copy. A file's size is taken from the open descriptor, and
exactly that many bytes are sent; a file that is truncated meanwhile ends the response early.

A transfer ends if its client neither receives nor sends for `SLOW_SECONDS`. A session has at most `AT_ONCE` transfers.
"""

import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from typing import Any, Literal, NamedTuple

from hypercore_agents.agent.isolation.backends import Isolation
from hypercore_agents.agent.isolation.disk_space import disk_full_reason
from hypercore_agents.agent.isolation.pipes import CommandChannel, channel_to
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.agent.launcher.workspace_files import MOST_LEVELS
from hypercore_agents.api.errors import (
    Conflict,
    Forbidden,
    HypercoreError,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    RateLimited,
    Unavailable,
    readable_size,
)
from hypercore_agents.api.files import MOST_ENTRIES, READ_LIMIT, WRITE_LIMIT, FileEntry, bytes_of, name_of

AT_ONCE = 8
"""Transfers of one session at a time."""
SLOW_SECONDS = 30.0
WHOLE_SECONDS = 600.0
_WORK_SECONDS = 60.0
_FINISH_SECONDS = 5.0
_FRAME = 256 * 1024
_TYPES: dict[str, Literal["file", "folder", "other"]] = {"f": "file", "d": "folder", "o": "other"}


class OpenFile(NamedTuple):
    """A file that is open in its session: `source` yields `size` bytes."""

    size: int
    source: CommandChannel


class WorkspaceFiles:
    """File operations in sessions' workspaces. All methods raise domain errors."""

    def __init__(self, isolation: Isolation) -> None:
        self._isolation = isolation
        self._transfers: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def open(self, folder: SessionFolder, path: str) -> AsyncIterator[OpenFile]:
        """Open a file for reading."""
        async with self._work(folder, path, "read", str(READ_LIMIT), limit=READ_LIMIT) as (answer, channel):
            yield OpenFile(int(answer["size"]), channel)

    async def write(self, folder: SessionFolder, path: str, body: AsyncIterable[bytes]) -> int:
        """Write or replace a file, creating its folders; return its size.

        If the body raises, the old file remains.
        """
        async with self._work(folder, path, "write", str(WRITE_LIMIT), limit=WRITE_LIMIT) as (_, channel):
            try:
                size = 0
                async for chunk in body:
                    size += len(chunk)
                    if size > WRITE_LIMIT:
                        raise _refusal("too_large", path, WRITE_LIMIT)
                    if not await _send(channel, chunk):
                        break
                else:
                    await channel.write(bytes(4), _WORK_SECONDS)
                answer = await self._answer(folder, await channel.line(_WORK_SECONDS), path, WRITE_LIMIT)
            except BaseException:
                await channel.finish(_FINISH_SECONDS)
                raise
        return int(answer["size"])

    async def delete(self, folder: SessionFolder, path: str) -> None:
        """Delete a file, a link or an empty folder."""
        async with self._work(folder, path, "delete"):
            pass

    async def list(
        self, folder: SessionFolder, after: str | None = None, limit: int = MOST_ENTRIES
    ) -> tuple[list[FileEntry], str | None]:
        """Return the entries after a path, and the path to continue after if there are more."""
        async with self._work(folder, after or "", "list", str(limit + 1)) as (_, channel):
            raw = b""
            while piece := await channel.read(_WORK_SECONDS):
                raw += piece
        entries = [_entry(line) for line in raw.split(b"\0") if line]
        return entries[:limit], entries[limit - 1].path if len(entries) > limit else None

    @contextlib.asynccontextmanager
    async def _work(
        self, folder: SessionFolder, path: str, operation: str, *arguments: str, limit: int = 0
    ) -> AsyncIterator[tuple[dict[str, Any], CommandChannel]]:
        # Bytes that are not UTF-8 become lone surrogates, as in the arguments of a program.
        raw = bytes_of(path).decode("utf-8", "surrogateescape")
        await self._isolation.prepare(folder)

        async def run(channel: int) -> int:
            work = (operation, raw, *arguments)
            return await self._isolation.work_on_files(folder, work, channel=channel, timeout=WHOLE_SECONDS)

        with self._transfer(folder.session_id):
            try:
                async with channel_to(run) as channel:
                    yield await self._answer(folder, await channel.line(_WORK_SECONDS), path, limit), channel
            except TimeoutError:
                raise Unavailable("the workspace did not answer in time; try again", retry_after=5) from None

    async def _answer(self, folder: SessionFolder, line: bytes, path: str, limit: int) -> dict[str, Any]:
        """Return an answer. Raises the domain error in it."""
        answer: dict[str, Any] = json.loads(line or b'{"error": "silent"}')
        if "error" not in answer:
            return answer
        if (
            answer["error"] in ("full", "silent")
            and (full := await disk_full_reason(self._isolation, folder)) is not None
        ):
            raise PayloadTooLarge(full)
        if answer["error"] == "full" and await self._isolation.usage(folder) is not None:
            raise PayloadTooLarge("the session's disk has no space left for this; delete files of the session first")
        raise _refusal(answer["error"], path, limit, cause=answer.get("cause", "it did not answer"))

    @contextlib.contextmanager
    def _transfer(self, session_id: str) -> Iterator[None]:
        if self._transfers[session_id] >= AT_ONCE:
            raise RateLimited(
                f"this session has {AT_ONCE} running file transfers, the maximum; wait until one ends",
                retry_after=1,
                details={"limit": AT_ONCE},
            )
        self._transfers[session_id] += 1
        try:
            yield
        finally:
            self._transfers[session_id] -= 1
            if not self._transfers[session_id]:
                del self._transfers[session_id]


async def _send(channel: CommandChannel, chunk: bytes) -> bool:
    for at in range(0, len(chunk), _FRAME):
        frame = chunk[at : at + _FRAME]
        if not await channel.write(len(frame).to_bytes(4, "big") + frame, _WORK_SECONDS):
            return False
    return True


def _refusal(kind: str, path: str, limit: int, *, cause: str = "") -> HypercoreError:
    shown = repr(path[:200])
    match kind:
        case "missing":
            return NotFound(f"the workspace has no file {shown}")
        case "outside":
            return Forbidden(f"{shown} is outside the workspace")
        case "denied":
            return Forbidden(f"the mode of {shown}, or of a folder above it, does not allow this; change it in a turn")
        case "folder":
            return InvalidRequest(f"path: {shown} is a folder, not a file", field="path")
        case "not_a_file":
            return InvalidRequest(f"path: {shown} is not a regular file", field="path")
        case "below_a_file":
            return InvalidRequest(
                f"path: a parent of {shown} is a file, not a folder; delete that file or change the path",
                field="path",
            )
        case "too_long":
            return InvalidRequest("path: a name has at most 255 bytes, and a path about 4,000", field="path")
        case "too_deep":
            return InvalidRequest(f"path: at most {MOST_LEVELS} nested folders", field="path")
        case "links":
            return InvalidRequest(f"path: {shown} has too many links", field="path")
        case "not_empty":
            return Conflict(f"the folder {shown} is not empty; delete its contents first")
        case "too_large":
            return PayloadTooLarge(f"the file is larger than {readable_size(limit)}", details={"limit_bytes": limit})
        case "full":
            return Unavailable(f"no space is left for the session's files ({cause}); delete files and try again")
    return Unavailable(f"the workspace could not be read or written: {cause}")


def _entry(line: bytes) -> FileEntry:
    kind, size, modified, path = line.split(b"\t", 3)
    return FileEntry(path=name_of(path), type=_TYPES[kind.decode()], size=int(size), modified_at=float(modified))
