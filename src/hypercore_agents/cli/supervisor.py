"""Child processes of `up`: started in order, watched, started again when they die, stopped in reverse order.

Each child asks the kernel to be told to stop when `up` itself dies (PR_SET_PDEATHSIG), so that not even a kill -9
of `up` leaves a gateway or a manager behind. A child that dies again and again is not hidden: after five deaths
within a minute everything is stopped and `up` fails with the name of the child.
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
_DEATHS_ALLOWED = 5
_DEATHS_WINDOW = 60.0


@dataclass
class Child:
    """One role to run. `ready_url` answers 200 once it serves; `stop_seconds` is how long it may take to stop.

    `program` is run in place of a command of ours.
    """

    name: str
    arguments: list[str]
    environment: Mapping[str, str]
    ready_url: str
    stop_seconds: float = 15.0
    program: str | None = None
    process: asyncio.subprocess.Process | None = None
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=_DEATHS_ALLOWED))


class Supervisor:
    """Runs children until `stop` is set, or one of them cannot be kept alive."""

    def __init__(self, children: list[Child], report: Callable[[str], None]) -> None:
        self._children = children
        self._report = report
        self.stop = asyncio.Event()

    async def run(self, *, start_seconds: float, on_ready: Callable[[], None]) -> None:
        """Start the children one after another, watch them until `stop`, then stop them.

        Raises CommandFault when a child does not become ready or does not stay alive.
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
            preexec_fn=lambda: _die_with(parent),
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
                    await self._revive(child)
        finally:
            stopping.cancel()

    async def _revive(self, child: Child) -> None:
        assert child.process is not None
        self._report(f"the {child.name} ended with status {child.process.returncode}; starting it again")
        now = time.monotonic()
        child.deaths.append(now)
        if len(child.deaths) == _DEATHS_ALLOWED and now - child.deaths[0] < _DEATHS_WINDOW:
            raise CommandError(
                f"the {child.name} died {_DEATHS_ALLOWED} times within {_DEATHS_WINDOW:.0f} s; giving up"
            )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), 0.1 * 2 ** len(child.deaths))
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


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)
