"""The files of one session on this agent: fetched when the session arrives, archived when they may have changed.

A file request counts as a transfer until its end: a session with a transfer is not released, since an archive made
meanwhile could hold half of a file. Once a user may have listed, read or written files, the folder is never given to
another session.
"""

import asyncio
import contextlib
from collections.abc import Iterator

import structlog

from hypercore_agents.agent.claude.context import AgentContext
from hypercore_agents.agent.claude.process import ClaudeFailed, ClaudeLimited
from hypercore_agents.agent.isolation.disk_space import disk_full_reason
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.agent.launcher.client import LaunchFailed
from hypercore_agents.agent.persistence.transcript_mirror import TranscriptMirror
from hypercore_agents.agent.persistence.workspace_archive import WorkspaceArchive
from hypercore_agents.agent.sessions.restore import SessionRestore
from hypercore_agents.api.errors import HypercoreError

_log = structlog.get_logger(__name__)


class SessionFiles:
    """One session's folder. `needs_fetch`: the session was on another agent before, so its state must be fetched.

    `predecessor` is set while an earlier placement of the session on this agent is still being removed; its result says
    whether the folder was removed.
    """

    def __init__(
        self,
        session_id: str,
        folder: SessionFolder,
        context: AgentContext,
        mirror: TranscriptMirror,
        notices: list[str],
        *,
        needs_fetch: bool,
        predecessor: "asyncio.Future[bool] | None",
    ) -> None:
        self.archive = WorkspaceArchive(
            session_id,
            folder,
            context.isolation,
            context.gateway,
            context.tasks,
            limit=context.workspace_bytes,
            entries=context.workspace_files,
        )
        self.history = SessionRestore(session_id, self.archive, mirror, context.isolation, context.gateway, notices)
        self.transfers = 0
        """Requests that read or change a file now."""
        self.touched = False
        """Whether a user may have listed, read or written files."""
        self.needs_fetch = needs_fetch
        """Whether the files and the transcript must still be fetched."""
        self._session_id = session_id
        self._context = context
        self._generation = mirror.generation
        self._predecessor = predecessor

    @property
    def folder(self) -> SessionFolder:
        """Where the session's files are. A session that takes a prewarmed CLI also takes its folder."""
        return self.archive.folder

    @folder.setter
    def folder(self, folder: SessionFolder) -> None:
        self.archive.folder = folder

    @contextlib.contextmanager
    def transferring(self) -> Iterator[None]:
        """Count a request that reads or changes a file until the end of the block."""
        self.transfers += 1
        try:
            yield
        finally:
            self.transfers -= 1

    async def wait_for_predecessor(self) -> None:
        """Wait until the session's earlier placement on this agent is removed. Raises Unavailable."""
        if self._predecessor is not None:
            await asyncio.wait((self._predecessor,))
            if not self._predecessor.result():
                await self._context.isolation.remove(self.folder)
            self._predecessor = None

    async def fetch(self) -> None:
        """Fetch the transcript and files that another agent stored, once. Raises ClaudeFailed."""
        if not self.needs_fetch:
            return
        await self._context.isolation.prepare(self.folder)
        try:
            await self.history.restore()
        except ClaudeFailed:
            await self.raise_if_full()
            raise
        self.needs_fetch = False

    async def save(self, seconds: float | None = None) -> str | None:
        """Archive the files if they may have changed since the last archive, in at most `seconds`.

        Returns a description of what is not archived, None if everything is.
        """
        missing: str | None
        try:
            async with asyncio.timeout(seconds):
                missing = (await self.archive.save(self._generation, unless_unchanged=True)).missing
        except TimeoutError:
            too_long = f"the archive takes more than {seconds or 0:.0f} s and continues"
            missing = f"the workspace is not archived yet: {too_long}"
        except (HypercoreError, OSError) as error:
            missing = f"the workspace is not archived: {str(error)[:300]}"
        if missing is not None:
            _log.warning("session.files_not_archived", session_id=self._session_id, error=missing)
        return missing

    def save_soon(self) -> None:
        """Archive the files in the background if they may have changed."""
        if self.archive.changed:
            self._context.tasks.start("save-files", self.save())

    async def limit_reached(self) -> str | None:
        """Return which limit the session has reached since the last call, None for none."""
        try:
            return await self._context.isolation.limit_reached(self.folder)
        except LaunchFailed:
            return None

    async def full_disk(self) -> str | None:
        """Return the notice that the session's disk is full, None while it is not."""
        return await disk_full_reason(self._context.isolation, self.folder)

    async def raise_if_full(self) -> None:
        """Raise ClaudeLimited, with the limit, when the session's disk has too little space for a CLI."""
        full = await self.full_disk()
        if full is not None:
            raise ClaudeLimited(full, details={"limit": "disk"})
