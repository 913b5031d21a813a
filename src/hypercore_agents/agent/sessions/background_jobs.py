"""What the turns of one session left running in the background, and what its user is told of its end.

A job is what a tool started and let go of (`command &`, `nohup`, `setsid`): when the tool's shell ends, it is no
descendant of the CLI any more. What descends from the CLI after a turn are its MCP servers, where the session has any;
a session without them has no business there, and what is there is a job too. What an MCP server lets go of cannot be
told from a job and counts as one. The CLI's own background commands are off (`environment.py`).

Invariants: `running` is what the last look saw; whoever ends a session's processes says so here, once, and the user
hears of it twice: in the session's events at once, and in the notices of its next turn, wherever that runs.
"""

from collections.abc import Callable

from hypercore_agents.agent.isolation.backends import BackgroundProcesses
from hypercore_agents.api.events import Notice
from hypercore_agents.api.options import SessionOptions


class BackgroundJobs:
    """One session's. `say` puts an event into its log, `note` a notice into its next answer."""

    def __init__(
        self, options: SessionOptions, *, say: Callable[[Notice], object], note: Callable[[str], object]
    ) -> None:
        self.running = False
        self._servers = bool(options.mcp_servers or options.skills)
        self._say = say
        self._note = note

    def saw(self, background: BackgroundProcesses) -> bool:
        """Note what runs besides the CLI now; say whether it is a job."""
        self.running = background.detached or (background.under_cli and not self._servers)
        return self.running

    def ended(self, why: str, *, aloud: bool = True) -> None:
        """Tell that what ran was ended, if anything did. `aloud`: no turn runs, whose answer would say it."""
        if self.running:
            self.running = False
            text = what_was_ended(why)
            self._note(text)
            if aloud:
                self._say(Notice(text=text))

    def ended_unseen(self, why: str) -> None:
        """Tell, in the next answer alone, that whatever ran was ended; nobody could look whether anything did."""
        if not self.running:
            self._note(f"what a turn left running in the background, if anything, was ended: {why}")


def what_was_ended(why: str) -> str:
    """Return what users read."""
    return f"what a turn left running in the background was ended: {why}"
