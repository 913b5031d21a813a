"""Background jobs: processes that outlive the turn that started them, and the notices to the user when they end.

A job is a process that a tool started and detached (`command &`, `nohup`, `setsid`): once the tool's shell ends, the
job is no longer a descendant of the CLI. The CLI's descendants after a turn are its MCP servers, if the session has
any; in a session without MCP servers, a descendant is a job too. A process that an MCP server detaches cannot be
distinguished from a job and counts as one. The CLI's own background commands are switched off (`environment.py`).

Invariants: `running` is the result of the last check. Code that ends a session's processes calls `ended` or
`possibly_ended` once. The user then gets a `notice` event at once, and a notice in the answer of the next turn, on any
agent.
"""

from collections.abc import Callable

from hypercore_agents.agent.claude.process import ClaudeProcess
from hypercore_agents.agent.isolation.backends import BackgroundProcesses, Isolation
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.api.events import Notice
from hypercore_agents.api.options import SessionOptions


class BackgroundJobs:
    """The jobs of one session. `publish` adds an event to its log, `notify` a notice to its next answer."""

    def __init__(
        self,
        options: SessionOptions,
        isolation: Isolation,
        *,
        publish: Callable[[Notice], object],
        notify: Callable[[str], object],
    ) -> None:
        self.running = False
        self._has_servers = bool(options.mcp_servers or options.skills)
        self._isolation = isolation
        self._publish = publish
        self._notify = notify

    async def check(self, process: ClaudeProcess | None, folder: SessionFolder) -> BackgroundProcesses:
        """Return what runs besides the CLI, and update `running`."""
        if process is None or process.pid is None or not process.alive:
            return BackgroundProcesses(False, False)
        background = await self._isolation.background_processes(folder, process.pid)
        self.record(background)
        return background

    async def check_during_turn(self, process: ClaudeProcess | None, folder: SessionFolder) -> None:
        """Record a job that the current turn started: it ends with the CLI if that has to be killed."""
        if process is not None and process.pid is not None and process.alive:
            background = await self._isolation.background_processes(folder, process.pid)
            # the CLI still waits for its descendants: they are tools, not jobs
            self.record(BackgroundProcesses(False, background.detached))

    async def check_after_crash(self, process: ClaudeProcess | None, folder: SessionFolder) -> None:
        """Record a job that the current turn started before its CLI crashed."""
        if self._isolation.separate:  # the CLI's PID namespace ended with the CLI, and so did every job in it
            self.possibly_ended("the session's Claude CLI ended during a turn")
        elif process is not None and process.pid is not None:
            self.record(await self._isolation.background_processes(folder, process.pid))

    def record(self, background: BackgroundProcesses) -> None:
        """Set `running` from the processes that run besides the CLI."""
        self.running = background.detached or (background.under_cli and not self._has_servers)

    def ended(self, reason: str, *, between_turns: bool = True) -> None:
        """Report that running jobs were ended. `between_turns`: no running turn's answer will report it."""
        if self.running:
            self.running = False
            text = ended_notice(reason)
            self._notify(text)
            if between_turns:
                self._publish(Notice(text=text))

    def possibly_ended(self, reason: str) -> None:
        """Report, in the next answer only, that jobs may have been ended: it is not known whether any ran."""
        if not self.running:
            self._notify(f"background processes of the session, if any, were ended: {reason}")


def ended_notice(reason: str) -> str:
    """Return the notice about jobs that were ended."""
    return f"background processes of the session were ended: {reason}"
