"""Supervision of the child processes of `up`: start in order, restart after a crash, stop in reverse order.

Each child requests SIGTERM for the death of its parent (PR_SET_PDEATHSIG), so a kill -9 of `up` leaves no gateway or
manager running. After five crashes of one child within a minute, `up` stops everything and fails with the child's name.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import aiohttp

from hypercore_agents.cli.command_errors import CommandError

_PR_SET_PDEATHSIG = 1
_CRASHES_ALLOWED = 5
_CRASH_WINDOW_SECONDS = 60.0


@dataclass
class Child:
    """One process to run. `ready_url` answers 200 once it serves; `stop_seconds` is the time limit for its stop.

    `program` replaces the `hypercore-agents` command.
    """

    name: str
    arguments: list[str]
    environment: Mapping[str, str]
    ready_url: str
    stop_seconds: float = 15.0
    program: str | None = None
    process: asyncio.subprocess.Process | None = None
    crashes: deque[float] = field(default_factory=lambda: deque(maxlen=_CRASHES_ALLOWED))


class Supervisor:
    """Runs child processes until `stop` is set or a child keeps crashing."""

    def __init__(self, children: list[Child], report: Callable[[str], None]) -> None:
        self._children = children
        self._report = report
        self.stop = asyncio.Event()

    async def run(self, *, start_seconds: float, on_ready: Callable[[], None]) -> None:
        """Start the children in order, supervise them until `stop` is set, then stop them.

        Raises CommandError if a child does not become ready or keeps crashing.
        """
        try:
            for child in self._children:
                await self._start(child)
                await self._until_ready(child, start_seconds)
            if not self.stop.is_set():
                on_ready()
            await self._watch()
        finally:
            for child in reversed(self._children):
                await self._stop(child)

    async def _start(self, child: Child) -> None:
        parent = os.getpid()
        child.process = await asyncio.create_subprocess_exec(
            *([child.program] if child.program else [sys.executable, "-m", "hypercore_agents"]), *child.arguments,
            env=dict(child.environment),
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: _stop_with(parent),
        )  # fmt: skip

    async def _until_ready(self, child: Child, seconds: float) -> None:
        assert child.process is not None
        deadline = time.monotonic() + seconds
        async with aiohttp.ClientSession() as client:
            while not self.stop.is_set():
                if child.process.returncode is not None:
                    raise CommandError(
                        f"the {child.name} ended with status {child.process.returncode}; see its log above"
                    )
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with client.get(child.ready_url, timeout=aiohttp.ClientTimeout(total=2)) as answer:
                        if answer.status == 200:
                            return
                if time.monotonic() > deadline:
                    raise CommandError(f"the {child.name} was not ready after {seconds:.0f} s ({child.ready_url})")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stop.wait(), 0.05)

    async def _watch(self) -> None:
        stopping = asyncio.create_task(self.stop.wait())
        try:
            while not self.stop.is_set():
                waits = {asyncio.create_task(child.process.wait()): child for child in self._children if child.process}
                try:
                    done, _ = await asyncio.wait({*waits, stopping}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for wait in waits:
                        wait.cancel()
                if stopping in done:
                    return
                for child in (waits[wait] for wait in done if wait in waits):
                    await self._restart(child)
        finally:
            stopping.cancel()

    async def _restart(self, child: Child) -> None:
        assert child.process is not None
        self._report(f"the {child.name} ended with status {child.process.returncode}; starting it again")
        now = time.monotonic()
        child.crashes.append(now)
        if len(child.crashes) == _CRASHES_ALLOWED and now - child.crashes[0] < _CRASH_WINDOW_SECONDS:
            raise CommandError(
                f"the {child.name} died {_CRASHES_ALLOWED} times within {_CRASH_WINDOW_SECONDS:.0f} s; giving up"
            )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), 0.1 * 2 ** len(child.crashes))
        if not self.stop.is_set():
            await self._start(child)

    async def _stop(self, child: Child) -> None:
        process = child.process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), child.stop_seconds)
        except TimeoutError:
            self._report(f"the {child.name} did not stop within {child.stop_seconds:.0f} s; killing it")
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _stop_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)
