"""The last steps of a turn: stores its transcript, archives its workspace and fetches its cost, before the answer.

The answer waits for these for a bounded time and says which of them are durable. The rest is stored later.
"""

import asyncio
from collections.abc import Callable

from hypercore_agents.agent.gateway.client import GatewayClient
from hypercore_agents.agent.sessions.session import Session
from hypercore_agents.api.chat import ChatResponse, Usage
from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.observability.metrics import AgentMetrics

DURABLE_SECONDS = 2.0
"""How long a turn's answer waits for the store."""
ARCHIVE_SECONDS = 8.0
"""How long a turn's answer waits for the workspace archive beyond the turn's own time; less than the manager waits
for a late answer."""
LONGEST_ARCHIVE_SECONDS = 120.0
"""How long a turn's answer waits for the workspace archive at most."""


class TurnStorage:
    """Stores one turn. Notices for its answer are added to `notices`."""

    def __init__(
        self,
        session: Session,
        turn: int,
        generation: int,
        gateway: GatewayClient,
        metrics: AgentMetrics,
        notices: list[str],
    ) -> None:
        self.transcript_durable = self.workspace_durable = False
        self.usage: Usage | None = None
        self._session = session
        self._turn = turn
        self._generation = generation
        self._gateway = gateway
        self._metrics = metrics
        self._notices = notices

    async def store(self, answer: Callable[[], ChatResponse], seconds_left: Callable[[], float]) -> None:
        """Store the turn. `answer` returns its last event, `seconds_left` the time until its deadline.

        The turn's last event is stored with its transcript: if the agent is lost right after, no stored turn
        appears to be lost. The store's answer usually contains the turn's usage: one request instead of two.
        """
        session = self._session
        archive = session.files.archive
        durable = True
        # Checked before the archive is made: a process that ended before then cannot write after it.
        wrote_late = archive.may_be_written_late
        archive.may_be_written_late = wrote_late and any(await session.check_processes())
        if wrote_late:  # an archive in progress, of an uploaded file, may be older than what a process has written
            archive.note_change()
        if wrote_late and (limit := await session.files.limit_reached()) is not None:
            self._notices.append(f"{limit}; processes of this turn were ended or could not start")
        if archive.changed:
            durable = await self._archive(min(ARCHIVE_SECONDS + seconds_left(), LONGEST_ARCHIVE_SECONDS))
        if wrote_late and (full := await session.files.full_disk()) is not None:
            self._notices.append(full)
        self._notices += session.take_notices()
        end = session.journal.announce(answer().model_copy(update={"durable": True, "workspace_durable": durable}))
        self.transcript_durable, self.usage = await session.mirror.conclude(self._turn, DURABLE_SECONDS, end=end)
        self.workspace_durable = durable
        if not self.transcript_durable:
            self._notices.append(
                "the session's transcript is full (TRANSCRIPT_MAX_MB): the session continues on this agent but not on "
                "another one; start a new session"
                if session.mirror.full
                else "this turn is not in the store yet; it would be lost if the agent were lost now"
            )

    async def _archive(self, seconds: float) -> bool:
        """Archive the session's files; return whether all of them are stored."""
        archive = self._session.files.archive
        try:
            async with asyncio.timeout(seconds):
                saved = await archive.save(self._generation)
        except TimeoutError:
            self._notices.append(
                f"the workspace is not archived yet: the archive takes more than {seconds:.0f} s and continues; the "
                "workspace is durable once an answer says so"
            )
            return False
        except (HypercoreError, OSError) as error:
            self._notices.append(f"the workspace is not archived: {str(error)[:300]}")
            return False
        if archive.may_be_written_late:
            archive.note_change()
        if saved.missing is not None:
            self._notices.append(saved.missing)
        return saved.missing is None

    async def account(self) -> None:
        """Fetch what the turn cost, unless the store's answer contained it, and count its tokens."""
        try:
            if self.usage is None:
                self.usage = await self._gateway.usage(self._session.session_id, self._turn, self._generation)
        except HypercoreError:
            self._notices.append(
                "the usage is missing because the gateway did not answer; it is recorded in the ledger"
            )
            return
        self._metrics.tokens.labels("input").inc(self.usage.input_tokens)
        self._metrics.tokens.labels("output").inc(self.usage.output_tokens)
