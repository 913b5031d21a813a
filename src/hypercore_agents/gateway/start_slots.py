"""Slots for starts of Claude CLIs, shared by all agents of this machine: a start needs a processor of the host.

An agent of a local backend (`process`, `microvm`) runs on the gateway's machine; its sandbox may believe that it has
more processors than there are. A slot is held for as long as the request for it stays open, so a sandbox that dies
gives its slots back. Agents are served round-robin. While many more threads are runnable than there are processors,
fewer slots are given, down to one. Agents elsewhere get a slot at once: their own bound adapts to their host.

Rejected: slots with a lease in the store (a write per start); a share per agent in the answer to its heartbeat (what
idle agents do not use would be lost).
"""

import asyncio
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

from hypercore_agents.api.errors import AtCapacity
from hypercore_agents.http.context import Receive, Scope, Send

WAIT_SECONDS = 25.0
"""How long a request waits for a slot before it is asked to come again."""
HOLD_SECONDS = 300.0
"""A slot is taken back after so long: the start hangs, and the others go on."""
KEEP_ALIVE_SECONDS = 10.0
_BUSY, _CALM = 3.0, 1.5
"""Runnable threads per processor above which the host gives fewer slots, and below which it gives more."""
_NARROWER, _WIDER = 0.7, 0.25


def runnable_threads() -> int | None:
    """Return how many threads of the machine want a processor now, None where the kernel does not say."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("procs_running "))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


class StartSlots:
    """The slots of this machine. `slots`: how many there are at most, by default as many as processors."""

    def __init__(self, slots: int | None = None, runnable: Callable[[], int | None] = runnable_threads) -> None:
        self._processors = len(os.sched_getaffinity(0))
        self._most = slots or self._processors
        self._width = float(self._most)
        self._runnable = runnable
        self._held = 0
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @property
    def limit(self) -> int:
        """How many slots are given at present."""
        return max(1, int(self._width))

    async def take(self, agent_id: str, *, wait: bool) -> None:
        """Take a slot for an agent; `give_back` must follow. Raises AtCapacity when there is none to be had."""
        self._adapt()
        if self._held < self.limit and not self._waiting:
            self._held += 1
            return
        if not wait:
            raise AtCapacity("all slots for starts of this host are in use", retry_after=1)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(agent_id, deque()).append(place)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled():
                self.give_back()  # it came in the same step
            else:
                self._leave(agent_id, place)
            if isinstance(error, TimeoutError):
                raise AtCapacity("no slot for a start became free on this host; ask again", retry_after=1) from None
            raise

    def give_back(self) -> None:
        """Give a slot back."""
        self._held -= 1
        self._adapt()
        self._serve()

    def _adapt(self) -> None:
        runnable = self._runnable()
        if runnable is None:
            return
        if runnable > _BUSY * self._processors:
            self._width = max(1.0, self._width * _NARROWER)
        elif runnable < _CALM * self._processors:
            self._width = min(float(self._most), self._width + _WIDER)

    def _serve(self) -> None:
        while self._held < self.limit and self._waiting:
            agent_id = next(iter(self._waiting))
            line = self._waiting.pop(agent_id)
            place = line.popleft()
            if line:
                self._waiting[agent_id] = line  # behind the other agents
            if not place.done():
                self._held += 1
                place.set_result(None)

    def _leave(self, agent_id: str, place: "asyncio.Future[None]") -> None:
        line = self._waiting.get(agent_id)
        if line is not None and place in line:
            line.remove(place)
            if not line:
                del self._waiting[agent_id]


class SlotHeld:
    """Holds a slot while the request for it stays open, and says so with a line; `slots` None: there is no bound.

    Raises AtCapacity before its first byte.
    """

    def __init__(self, slots: StartSlots | None, agent_id: str, *, wait: bool) -> None:
        self._slots = slots
        self._agent_id = agent_id
        self._wait = wait

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request."""
        gone = asyncio.create_task(_until_gone(receive), name="start-slots.gone")
        taking: asyncio.Task[None] | None = None
        try:
            if self._slots is not None:
                taking = asyncio.create_task(self._slots.take(self._agent_id, wait=self._wait), name="start-slots.take")
                await asyncio.wait((gone, taking), return_when=asyncio.FIRST_COMPLETED)
                if not taking.done():
                    return
                taking.result()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"granted\n", "more_body": True})
            until = asyncio.get_running_loop().time() + HOLD_SECONDS
            while not gone.done() and asyncio.get_running_loop().time() < until:
                await asyncio.wait((gone,), timeout=KEEP_ALIVE_SECONDS)
                if not gone.done():
                    await send({"type": "http.response.body", "body": b"\n", "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            if taking is not None and self._slots is not None:
                taking.cancel()
                await asyncio.wait((taking,))
                if not taking.cancelled() and taking.exception() is None:
                    self._slots.give_back()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
