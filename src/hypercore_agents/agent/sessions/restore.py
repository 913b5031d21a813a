"""What a session has behind it, brought to where its CLI looks: its transcript, and the files that another agent left.

A transcript here belongs to the session's user, so a tool may remove or spoil it. The store's takes its place only once
the store has all that was said here: the conversation never goes on from less than that unnoticed.
"""

import structlog

from hypercore_agents.agent.claude.process import ClaudeFailed
from hypercore_agents.agent.gateway.client import Gateway
from hypercore_agents.agent.isolation.backends import Isolation
from hypercore_agents.agent.launcher.client import LimitReached
from hypercore_agents.agent.persistence.transcript import TranscriptMirror, restore
from hypercore_agents.agent.persistence.workspace_archive import WorkspaceArchive
from hypercore_agents.api.errors import Unavailable

_log = structlog.get_logger(__name__)
STORE_SECONDS = 10.0
"""How long a history that cannot be resumed waits for the store to have all of it."""


class SessionRestore:
    """One session's on this agent. What its user should know is put into `notices`."""

    def __init__(
        self,
        session_id: str,
        archive: WorkspaceArchive,
        mirror: TranscriptMirror,
        isolation: Isolation,
        gateway: Gateway,
        notices: list[str],
    ) -> None:
        self._session_id = session_id
        self._archive = archive
        self._mirror = mirror
        self._isolation = isolation
        self._gateway = gateway
        self._notices = notices

    async def is_here(self) -> bool:
        """Say whether there is a transcript where the CLI looks for it."""
        folder = self._archive.folder
        return await self._isolation.file_size(folder, folder.transcript) is not None

    async def bring_again(self, timeout: float, *, missing: bool) -> bool:
        """Write the transcript anew from the store, for a CLI that finds none or cannot resume the one that is there.

        `timeout` is the turn's, in seconds; at most half of it, and STORE_SECONDS, is waited for the store to have all
        of the history. One that can never have all of it gives what it has where there is nothing here to lose.
        Returns whether there is a transcript now. Raises Unavailable for now, ClaudeFailed for good.
        """
        _log.warning("session.transcript_spoilt", session_id=self._session_id, missing=missing)
        whole = await self._mirror.settled(min(STORE_SECONDS, timeout / 2))
        if not whole and not self._mirror.lost:
            raise Unavailable(
                "the session's history is damaged here, and the store does not have all of it yet; try again",
                retry_after=5,
            )
        if not whole and not missing:
            raise ClaudeFailed(
                "the session's history is damaged here, and the store could not take all of it; start a new session"
            )
        folder = self._archive.folder
        await self._isolation.prepare(folder)
        try:
            kept = await self._gateway.transcript(self._session_id, self._mirror.generation)
            await restore(kept, folder, self._isolation)
        except LimitReached:  # nothing is wrong with the history
            raise
        except (OSError, TimeoutError, Unavailable) as error:
            _log.warning("session.not_brought_back", session_id=self._session_id, error=str(error)[:300])
            raise Unavailable(
                "the session's history is damaged here and could not be fetched; try again", retry_after=5
            ) from None
        if not kept.entries:
            self._notices.append("no earlier history of the session was kept; the conversation starts anew here")
        elif whole:
            self._notices.append("the session's history was damaged here and was fetched from the store")
        else:
            self._notices.append("the session's history was damaged here; it goes on from what the store could keep")
        return bool(kept.entries) and await self.is_here()

    async def bring(self) -> None:
        """Fetch the transcript and the workspace that another agent left. Raises ClaudeFailed when that cannot be."""
        folder, generation = self._archive.folder, self._mirror.generation
        try:
            kept = await self._gateway.transcript(self._session_id, generation)
            if kept.workspace is not None:
                await self._archive.restore(generation, kept.workspace)
            left_out = await restore(kept, folder, self._isolation)
        except LimitReached:  # nothing is wrong with the history
            raise
        except (OSError, TimeoutError, Unavailable) as error:
            _log.warning("session.not_brought_back", session_id=self._session_id, error=str(error)[:300])
            raise ClaudeFailed("the session could not be brought here from where it was; try again") from None
        if not kept.entries:
            self._notices.append("no earlier history of the session was kept; the conversation starts anew here")
        if left_out:
            self._notices.append(f"{left_out} entries of the history were damaged and are left out")
        _log.info("session.brought_back", session_id=self._session_id, entries=len(kept.entries))
