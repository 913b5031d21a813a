"""Start slots: how many Claude CLIs may start at a time on this machine, over all of its agents.

Starting a CLI takes a processor of the host. An agent of a local backend (`process`, `microvm`) runs on the gateway's
machine, and its sandbox may see more processors than the machine has. A slot is held while the request for it stays
open, so an agent that dies releases its slots. Agents are served round-robin. While there are many more runnable
threads than processors, fewer slots are granted, down to one. Agents on other machines get a slot immediately: their
own limit adapts to their host.

Rejected: slots with a lease in the store (a write per start); a share per agent in the response to its heartbeat (the
shares of idle agents would be lost).
"""

import asyncio
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

from hypercore_agents.api.errors import AtCapacity
from hypercore_agents.http.context import Receive, Scope, Send

WAIT_SECONDS = 25.0
"""Maximum wait of a request for a slot; then it must be repeated."""
HOLD_SECONDS = 300.0
"""A slot is released after this time: the start hangs, and must not block the others."""
KEEP_ALIVE_SECONDS = 10.0
_BUSY, _CALM = 3.0, 1.5
"""Runnable threads per processor above which the number of slots falls, and below which it rises."""
_SHRINK_FACTOR, _GROW_STEP = 0.7, 0.25


def runnable_threads() -> int | None:
    """Return the number of runnable threads of this machine; None if the kernel does not report it."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("procs_running "))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


class StartSlots:
    """The start slots of this machine. `slots` is their maximum number, by default the number of processors."""

    def __init__(self, slots: int | None = None, runnable: Callable[[], int | None] = runnable_threads) -> None:
        self._processors = len(os.sched_getaffinity(0))
        self._maximum = slots or self._processors
        self._width = float(self._maximum)
        self._runnable = runnable
        self._held = 0
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @property
    def limit(self) -> int:
        """Number of slots that may be held at present."""
        return max(1, int(self._width))

    async def take(self, agent_id: str, *, wait: bool) -> None:
        """Take a slot for an agent; `release` must follow. Raises AtCapacity if no slot is free, or becomes free."""
        self._adapt()
        if self._held < self.limit and not self._waiting:
            self._held += 1
            return
        if not wait:
            raise AtCapacity("all start slots of this host are in use", retry_after=1)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(agent_id, deque()).append(waiter)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled():
                self.release()  # the slot was granted in the same step
            else:
                self._remove(agent_id, waiter)
            if isinstance(error, TimeoutError):
                raise AtCapacity("no start slot became free on this host; try again", retry_after=1) from None
            raise

    def release(self) -> None:
        """Release a slot."""
        self._held -= 1
        self._adapt()
        self._grant()

    def _adapt(self) -> None:
        runnable = self._runnable()
        if runnable is None:
            return
        if runnable > _BUSY * self._processors:
            self._width = max(1.0, self._width * _SHRINK_FACTOR)
        elif runnable < _CALM * self._processors:
            self._width = min(float(self._maximum), self._width + _GROW_STEP)

    def _grant(self) -> None:
        while self._held < self.limit and self._waiting:
            agent_id = next(iter(self._waiting))
            queue = self._waiting.pop(agent_id)
            waiter = queue.popleft()
            if queue:
                self._waiting[agent_id] = queue  # behind the other agents
            if not waiter.done():
                self._held += 1
                waiter.set_result(None)

    def _remove(self, agent_id: str, waiter: "asyncio.Future[None]") -> None:
        queue = self._waiting.get(agent_id)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
            if not queue:
                del self._waiting[agent_id]


class HeldSlot:
    """A response that holds a slot while it is open, and sends a line once it has it. `slots` None: no limit.

    Raises AtCapacity before its first byte.
    """

    def __init__(self, slots: StartSlots | None, agent_id: str, *, wait: bool) -> None:
        self._slots = slots
        self._agent_id = agent_id
        self._wait = wait

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request."""
        disconnected = asyncio.create_task(_wait_for_disconnect(receive), name="start-slots.disconnect")
        taking: asyncio.Task[None] | None = None
        try:
            if self._slots is not None:
                taking = asyncio.create_task(self._slots.take(self._agent_id, wait=self._wait), name="start-slots.take")
                await asyncio.wait((disconnected, taking), return_when=asyncio.FIRST_COMPLETED)
                if not taking.done():
                    return
                taking.result()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"granted\n", "more_body": True})
            until = asyncio.get_running_loop().time() + HOLD_SECONDS
            while not disconnected.done() and asyncio.get_running_loop().time() < until:
                await asyncio.wait((disconnected,), timeout=KEEP_ALIVE_SECONDS)
                if not disconnected.done():
                    await send({"type": "http.response.body", "body": b"\n", "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            disconnected.cancel()
            if taking is not None and self._slots is not None:
                taking.cancel()
                await asyncio.wait((taking,))
                if not taking.cancelled() and taking.exception() is None:
                    self._slots.release()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
