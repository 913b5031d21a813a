"""A backend that keeps the contract and starts nothing: sandboxes are entries of a table in memory.

The table is a `MemoryHost`, apart from the backend: two backends on one host are a manager and its successor.
Where a test needs an agent that answers, `serve` starts one in the test's process and returns its address.

Rejected: mocks of `ComputeBackend` in each test, which pass although they break the contract.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from hypercore_agents.compute.base import (
    Capabilities,
    ComputeBackend,
    HostUsage,
    InsufficientResources,
    MemoryAccount,
    Sandbox,
    SandboxError,
    SandboxRefused,
    SandboxRequest,
    SandboxState,
)

LOG_BYTES = 1 << 20
"""How much of what an agent printed is kept, in bytes."""


@dataclass
class MemorySandbox:
    """One pretended sandbox: what was asked, what is observed, what it printed."""

    request: SandboxRequest
    sandbox: Sandbox
    log: bytes = b""


@dataclass
class MemoryHost:
    """The machine that the sandboxes of one or several backends pretend to run on.

    `room` is how many sandboxes fit; `breaks_at` names the step at which every start fails: "reserve" or "serve".
    `charged_mb` is what control groups count for each agent and for templates ("templates"); None: nothing counts.
    """

    room: int = 1000
    sandboxes: dict[str, MemorySandbox] = field(default_factory=dict)
    breaks_at: str | None = None
    charged_mb: dict[str, int] | None = None
    locks: dict[str, asyncio.Lock] = field(default_factory=dict)

    def exit(self, agent_id: str, status: int, reason: str = "the test ended it") -> None:
        """Let the agent end, as if by itself. Raises KeyError when there is none."""
        entry = self.sandboxes[agent_id]
        entry.sandbox = replace(entry.sandbox, state=SandboxState.EXITED, exit_status=status, exit_reason=reason)

    def print(self, agent_id: str, output: bytes) -> None:
        """Add to what the agent printed. Raises KeyError when there is none."""
        entry = self.sandboxes[agent_id]
        entry.log = (entry.log + output)[-LOG_BYTES:]


async def _nowhere(_: SandboxRequest) -> str:
    # Port 9, discard: nothing answers there, and nothing will by chance.
    return "http://127.0.0.1:9"


async def _nothing(_: str) -> None:
    return


class MemoryBackend(ComputeBackend):
    """Keeps the contract in memory. `serve` starts what stands in for the agent, `cease` ends it."""

    name = "memory"
    capabilities = Capabilities(
        isolation="none: nothing runs",
        separates_agents=True,
        separates_network=True,
        separates_sessions=True,
        enforced_limits=frozenset({"cores", "memory", "pids"}),
    )

    def __init__(
        self,
        host: MemoryHost | None = None,
        *,
        serve: Callable[[SandboxRequest], Awaitable[str]] = _nowhere,
        cease: Callable[[str], Awaitable[None]] = _nothing,
        images: bool = False,
    ) -> None:
        self.capabilities = replace(self.capabilities, images=images)
        self.host = host or MemoryHost()
        self._serve = serve
        self._cease = cease

    async def start(self, request: SandboxRequest) -> Sandbox:
        """Add an entry to the host's table, with the address that `serve` gives."""
        if request.gpu_quota_mb:
            raise SandboxRefused("gpu_quota: there is no GPU in memory; leave it out or give 0", field="gpu_quota")
        if request.image is not None and not self.capabilities.images:
            raise SandboxRefused("image: there are none in memory; leave it out", field="image")
        async with self._alone(request.agent_id):
            known = self.host.sandboxes.get(request.agent_id)
            if known:
                return known.sandbox
            if len(self.host.sandboxes) >= self.host.room:
                raise InsufficientResources(f"the host has room for {self.host.room} sandboxes and all are taken")
            self._break("reserve")
            address = await self._serve(request)
            try:
                self._break("serve")
            except SandboxError:
                await self._cease(request.agent_id)
                raise
            sandbox = Sandbox(request.agent_id, address, SandboxState.RUNNING, started_at=time.time())
            self.host.sandboxes[request.agent_id] = MemorySandbox(request, sandbox)
            return sandbox

    async def stop(self, agent_id: str, *, grace: float = 10.0) -> None:
        """Remove the entry after `cease` has ended what `serve` began."""
        async with self._alone(agent_id):
            if agent_id in self.host.sandboxes:
                await self._cease(agent_id)
                del self.host.sandboxes[agent_id]

    async def inspect(self, agent_id: str) -> Sandbox | None:
        """Return the entry, None when there is none."""
        entry = self.host.sandboxes.get(agent_id)
        return entry.sandbox if entry else None

    async def list(self) -> list[Sandbox]:
        """Return all entries of the host."""
        return [entry.sandbox for entry in self.host.sandboxes.values()]

    async def logs(self, agent_id: str, *, limit: int = 65536) -> bytes:
        """Return the end of what `MemoryHost.print` added."""
        entry = self.host.sandboxes.get(agent_id)
        return entry.log[-limit:] if entry and limit > 0 else b""

    async def usage(self) -> HostUsage:
        """Return what was given, of a host that has plenty."""
        asked = [entry.request for entry in self.host.sandboxes.values()]
        charged = self.host.charged_mb
        return HostUsage(
            cores=1 << 16,
            cores_used=sum(request.cores for request in asked),
            memory_mb=1 << 24,
            memory_used_mb=sum(request.memory_mb for request in asked),
            sandboxes=len(asked),
            disk_mb=1 << 24,
            load=0.5,
            memory_free_mb=1 << 23,
            disk_free_mb=1 << 22,
            agents_memory={
                request.agent_id: MemoryAccount(request.memory_mb, charged[request.agent_id])
                for request in asked
                if charged is not None and request.agent_id in charged
            },
            templates_memory=None if charged is None else MemoryAccount(100, charged.get("templates", 0)),
        )

    def _alone(self, agent_id: str) -> asyncio.Lock:
        return self.host.locks.setdefault(agent_id, asyncio.Lock())

    def _break(self, step: str) -> None:
        if self.host.breaks_at == step:
            raise SandboxError(f"the test lets every start fail at step {step}")
