"""Restores a session on this agent: writes its transcript to the path that the CLI reads, and fetches its files.

The transcript on disk belongs to the session's user, so a tool may delete or damage it. The store's copy replaces it
only once the store has all entries of this agent: no part of a conversation is lost without a notice.
"""

import structlog

from hypercore_agents.agent.claude.process import ClaudeFailed
from hypercore_agents.agent.gateway.client import GatewayClient
from hypercore_agents.agent.isolation.backends import Isolation
from hypercore_agents.agent.launcher.client import LimitReached
from hypercore_agents.agent.persistence.transcript import restore
from hypercore_agents.agent.persistence.transcript_mirror import TranscriptMirror
from hypercore_agents.agent.persistence.workspace_archive import WorkspaceArchive
from hypercore_agents.api.errors import Unavailable

_log = structlog.get_logger(__name__)
STORE_SECONDS = 10.0
"""How long a turn with a damaged transcript waits for the store to have all of it."""
_NO_HISTORY = "the store has no earlier history of the session; the conversation starts from the beginning"


class SessionRestore:
    """Restores one session. Notices for its user are added to `notices`."""

    def __init__(
        self,
        session_id: str,
        archive: WorkspaceArchive,
        mirror: TranscriptMirror,
        isolation: Isolation,
        gateway: GatewayClient,
        notices: list[str],
    ) -> None:
        self._session_id = session_id
        self._archive = archive
        self._mirror = mirror
        self._isolation = isolation
        self._gateway = gateway
        self._notices = notices

    async def has_transcript(self) -> bool:
        """Return whether there is a transcript at the path that the CLI reads."""
        folder = self._archive.folder
        return await self._isolation.file_size(folder, folder.transcript) is not None

    async def replace_transcript(self, timeout: float, *, missing: bool) -> bool:
        """Replace the transcript by the store's copy, for a CLI that finds none or cannot resume the one on disk.

        `timeout` is the turn's, in seconds; at most half of it, and at most STORE_SECONDS, is spent waiting for the
        store to have the whole transcript. If the store can never have the whole transcript and the one on disk
        is missing, the part that the store has is used.
        Returns whether there is a transcript now. Raises Unavailable when a retry may succeed, else ClaudeFailed.
        """
        _log.warning("session.transcript_damaged", session_id=self._session_id, missing=missing)
        whole = await self._mirror.wait_until_stored(min(STORE_SECONDS, timeout / 2))
        if not whole and not self._mirror.lost:
            raise Unavailable(
                "the session's history is damaged on this agent, and the store does not have all of it yet; try again",
                retry_after=5,
            )
        if not whole and not missing:
            raise ClaudeFailed(
                "the session's history is damaged on this agent, and the store could not take all of it; start a new "
                "session"
            )
        folder = self._archive.folder
        await self._isolation.prepare(folder)
        try:
            stored = await self._gateway.transcript(self._session_id, self._mirror.generation)
            await restore(stored, folder, self._isolation)
        except LimitReached:  # nothing is wrong with the history
            raise
        except (OSError, TimeoutError, Unavailable) as error:
            _log.warning("session.not_restored", session_id=self._session_id, error=str(error)[:300])
            raise Unavailable(
                "the session's history is damaged on this agent and could not be fetched; try again", retry_after=5
            ) from None
        if not stored.entries:
            self._notices.append(_NO_HISTORY)
        elif whole:
            self._notices.append("the session's history was damaged on this agent and was fetched from the store")
        else:
            self._notices.append(
                "the session's history was damaged on this agent; it continues from the part that the store has"
            )
        return bool(stored.entries) and await self.has_transcript()

    async def restore(self) -> None:
        """Fetch the transcript and the workspace that another agent stored. Raises ClaudeFailed."""
        folder, generation = self._archive.folder, self._mirror.generation
        try:
            stored = await self._gateway.transcript(self._session_id, generation)
            if stored.workspace is not None:
                await self._archive.restore(generation, stored.workspace)
            left_out = await restore(stored, folder, self._isolation)
        except LimitReached:  # nothing is wrong with the history
            raise
        except (OSError, TimeoutError, Unavailable) as error:
            _log.warning("session.not_restored", session_id=self._session_id, error=str(error)[:300])
            raise ClaudeFailed("the session could not be moved to this agent; try again") from None
        if not stored.entries:
            self._notices.append(_NO_HISTORY)
        if left_out:
            self._notices.append(f"{left_out} entries of the history were damaged and are left out")
        _log.info("session.restored", session_id=self._session_id, entries=len(stored.entries))
