"""The archive of a session's files: stored outside the agent, and restored on another agent.

`tar` runs inside the session's isolation. Its stream passes through compression (`archive_format`) to the gateway, and
back the same way: nothing is stored on the server, and memory is bounded however large the workspace is. An archive is
named by its SHA-256, which is known only at its end, so the gateway names it. An archive of up to `_BUFFER` bytes is
held in memory until its digest is known. For a larger one that was stored before, a first pass computes only the
digest. So an unchanged workspace is not sent again.

Files that cannot be read are not in the archive, and `save` names them: a session's files are durable only if all of
them were read. GNU tar extracts members only below the folder that it unpacks into. Size and number of files are
bounded in both directions, since one sandbox must not be able to overload another.

Rejected: a spool file (its size is a second limit, and sessions would share it); a fingerprint of times and sizes
instead of the first pass (a mapped file changes without either).
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import NamedTuple

from hypercore_agents.agent.gateway.client import GatewayClient
from hypercore_agents.agent.isolation.backends import Isolation
from hypercore_agents.agent.isolation.pipes import CommandInput, input_of, output_of
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.agent.persistence.archive_format import (
    LONGEST_PATH,
    ArchiveTooLarge,
    Packer,
    PathTooLong,
    Unpacker,
)
from hypercore_agents.api.errors import HypercoreError, PayloadTooLarge, readable_size
from hypercore_agents.kit.aio.tasks import Tasks

_BUFFER = 1 << 20
_WHOLE_SECONDS = 900.0
_SILENT_SECONDS = 60.0
_UNPACK = (
    "tar", "--extract", "--file=-", "--no-same-owner", "--no-same-permissions", "--delay-directory-restore",
    "--warning=none",
    r"--transform=s,^\.\(/\|$\),workspace\1,S",
)  # fmt: skip
"""Members of the workspace are `./...`, as in older archives, which have no others. Targets of symbolic links stay."""
_UNREAD = re.compile(r"tar: (.*): Warning: (?:Cannot (?!stat: No such file)|Read error)")
_NAMED, _LONGEST_NAME = 3, 100


class Saved(NamedTuple):
    """The result of an archive. `missing` describes what it lacks; None if it is complete."""

    missing: str | None = None


class WorkspaceArchive:
    """One session's files. Limits before compression: `limit` in bytes of contents, `entries` in files and folders."""

    def __init__(
        self,
        session_id: str,
        folder: SessionFolder,
        isolation: Isolation,
        gateway: GatewayClient,
        tasks: Tasks,
        *,
        limit: int,
        entries: int,
    ) -> None:
        self.folder = folder
        self.digest: str | None = None
        """The stored archive's digest."""
        self.may_be_written_late = False
        """Whether a tool that can leave processes running was called since the session's last process check."""
        self._changes = self._archived = 0
        self._saving = asyncio.Lock()
        self._session_id = session_id
        self._isolation = isolation
        self._gateway = gateway
        self._tasks = tasks
        self._limit = limit
        self._entries = entries

    @property
    def changed(self) -> bool:
        """Whether files may have changed since the stored archive was made."""
        return self._changes != self._archived

    def note_change(self) -> None:
        """Note that files may have changed: an archive that is being made now may miss the change."""
        self._changes += 1

    async def save(self, generation: int, *, unless_unchanged: bool = False) -> Saved:
        """Archive the session's files, unless the store has them already. Raises HypercoreError, OSError, TimeoutError.

        `unless_unchanged`: skip the archive when no change was noted. Saving continues when the caller is cancelled; a
        later call finds it done.
        """
        outcome = await asyncio.shield(self._tasks.start("archive", self._save_alone(generation, unless_unchanged)))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _save_alone(self, generation: int, unless_unchanged: bool) -> Saved | Exception:
        async with self._saving:  # otherwise an older state could be recorded after a newer one
            if unless_unchanged and not self.changed:
                return Saved()  # another caller has just archived the change
            changes = self._changes  # later changes may be missing in this archive
            try:
                async with asyncio.timeout(_WHOLE_SECONDS):
                    saved = await self._save(generation)
            except ArchiveTooLarge as error:
                return _too_large(error)
            except PathTooLong:
                return PayloadTooLarge(
                    f"the workspace has a path of more than {LONGEST_PATH} bytes, which cannot be restored; shorten or "
                    "remove it"
                )
            except TimeoutError:
                return OSError("the archive took too long")
            except ValueError as error:
                return OSError(str(error))
            except (HypercoreError, OSError) as error:
                return error
            if saved.missing is None:
                self._archived = changes
            return saved

    async def _save(self, generation: int) -> Saved:
        tar_run = self._tar_run()
        async with contextlib.aclosing(tar_run.pieces()) as pieces:
            first, is_complete = await _up_to(pieces, _BUFFER)
            if is_complete and tar_run.digest() == self.digest:
                return tar_run.saved()
            if is_complete or self.digest is None:
                return await self._send(generation, tar_run, _chained(first, pieces))
            first.clear()
            async for _ in pieces:  # only for the digest
                pass
        if tar_run.digest() == self.digest:
            return tar_run.saved()
        tar_run = self._tar_run()
        async with contextlib.aclosing(tar_run.pieces()) as pieces:
            return await self._send(generation, tar_run, pieces)

    async def _send(self, generation: int, tar_run: "_TarRun", pieces: AsyncIterator[bytes]) -> Saved:
        try:
            digest = await self._gateway.put_workspace(self._session_id, generation, pieces)
        except HypercoreError:
            if tar_run.failure is not None:  # the cause of the failed upload
                raise tar_run.failure from None
            raise
        if digest != tar_run.digest():
            raise OSError("the gateway received a different archive than was sent")
        self.digest = digest
        return tar_run.saved()

    def _tar_run(self) -> "_TarRun":
        return _TarRun(
            lambda out, err: self._isolation.pack(self.folder, stdout=out, stderr=err, timeout=_WHOLE_SECONDS),
            Packer(self._limit, self._entries),
        )

    async def restore(self, generation: int, digest: str) -> None:
        """Restore archived files. Raises HypercoreError, OSError or TimeoutError; some files may be restored then."""
        unpacker = Unpacker(self._limit, self._entries)
        command = (*_UNPACK, f"--directory={self.folder.root}")

        async def unpack(stdin: int, stderr: int) -> int:
            return await self._isolation.run_as(
                self.folder, command, stdin=stdin, stderr=stderr, timeout=_WHOLE_SECONDS
            )

        try:
            async with asyncio.timeout(_WHOLE_SECONDS), input_of(unpack) as tar:
                async with contextlib.aclosing(
                    self._gateway.get_workspace(self._session_id, generation, digest)
                ) as packed:
                    await _unpack(packed, unpacker, tar)
                if unpacker.end() != digest:
                    raise OSError("the archive is not the requested one")
                status = await tar.end(_SILENT_SECONDS)
                if status != 0:
                    raise OSError(
                        f"tar ended with status {status}: {(await tar.errors())[:200].decode(errors='replace')}"
                    )
        except ArchiveTooLarge as error:
            raise OSError(_too_large(error).message) from None
        except PathTooLong:
            raise OSError(f"the archive has a path of more than {LONGEST_PATH} bytes") from None
        except ValueError as error:
            raise OSError(str(error)) from None
        self.digest = digest


class _TarRun:
    """One run of tar over a session's files, and the resulting archive."""

    def __init__(self, run: Callable[[int, int], Awaitable[int]], packer: Packer) -> None:
        self.failure: Exception | None = None
        self._run = run
        self._packer = packer
        self._missing: str | None = None

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the archive's bytes. Raises HypercoreError, OSError, TimeoutError, ArchiveTooLarge or ValueError."""
        try:
            async with output_of(self._run) as tar:
                while data := await tar.read(_SILENT_SECONDS):
                    if packed := await asyncio.to_thread(self._packer.feed, data):
                        yield packed
                status = await tar.status()
                if status not in (0, 1):  # 1: a file changed while it was read
                    raise OSError(f"tar ended with status {status}")
                self._missing = _missing(await tar.errors())
                if packed := await asyncio.to_thread(self._packer.end):
                    yield packed
        except Exception as error:
            self.failure = error
            raise

    def digest(self) -> str:
        """Return the archive's digest, after all pieces were yielded."""
        return self._packer.digest()

    def saved(self) -> Saved:
        """Return the archive's result, after all pieces were yielded."""
        return Saved(self._missing)


async def _unpack(packed: AsyncIterator[bytes], unpacker: Unpacker, tar: CommandInput) -> None:
    """Unpack an archive into tar's input, for as long as tar reads it."""
    async for chunk in packed:
        pieces = unpacker.feed(chunk)
        while plain := await asyncio.to_thread(next, pieces, b""):
            if not await tar.write(plain, _SILENT_SECONDS):
                status = await tar.end(_SILENT_SECONDS)
                errors = (await tar.errors())[:200].decode(errors="replace")
                raise OSError(f"tar ended with status {status}: {errors}")


async def _up_to(pieces: AsyncIterator[bytes], size: int) -> tuple[list[bytes], bool]:
    """Return the first pieces, up to about `size` bytes, and whether these are all."""
    first: list[bytes] = []
    total = 0
    async for piece in pieces:
        first.append(piece)
        total += len(piece)
        if total > size:
            return first, False
    return first, True


async def _chained(first: list[bytes], more: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    while first:
        yield first.pop(0)
    async for piece in more:
        yield piece


def _missing(errors: bytes) -> str | None:
    """Return a notice about the files that tar could not read."""
    lines = errors.decode(errors="replace").splitlines()
    names = [unread[1].removeprefix("./") for line in lines if (unread := _UNREAD.match(line))]
    if not names:
        return None
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    named = ", ".join(name[:_LONGEST_NAME] for name in names[:_NAMED])
    return f"the workspace is not archived completely: these files could not be read: {named}{more}"


def _too_large(error: ArchiveTooLarge) -> PayloadTooLarge:
    if error.in_bytes:
        return PayloadTooLarge(
            f"the workspace's files have more than {readable_size(error.limit)}, too many to archive (WORKSPACE_MAX_MB)"
        )
    return PayloadTooLarge(
        f"the workspace has more than {error.limit} files and folders, too many to archive (WORKSPACE_MAX_FILES)"
    )
