"""A backend that fulfils the contract without starting anything: its sandboxes are entries of a table in memory.

The table is a `MemoryHost`, separate from the backend: two backends on one host represent a manager and its successor.
If a test needs an agent that answers, `serve` starts one in the test's process and returns its address.

Rejected: mocks of `ComputeBackend` in each test, which pass even if they violate the contract.
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
"""Maximum of stored output of an agent, in bytes."""


@dataclass
class MemorySandbox:
    """One simulated sandbox: its request, its observed state, and its output."""

    request: SandboxRequest
    sandbox: Sandbox
    log: bytes = b""


@dataclass
class MemoryHost:
    """The simulated host of one or several backends.

    `max_sandboxes` is the number of sandboxes that fit. `fails_at` is the step at which every start fails: "reserve" or
    "serve". `charged_mb` is the memory that control groups count for each agent, and for templates ("templates"); None:
    no control group counts it.
    """

    max_sandboxes: int = 1000
    sandboxes: dict[str, MemorySandbox] = field(default_factory=dict)
    fails_at: str | None = None
    charged_mb: dict[str, int] | None = None
    locks: dict[str, asyncio.Lock] = field(default_factory=dict)

    def exit(self, agent_id: str, status: int, reason: str = "the test ended it") -> None:
        """Let the agent exit, as if by itself. Raises KeyError if it does not exist."""
        entry = self.sandboxes[agent_id]
        entry.sandbox = replace(entry.sandbox, state=SandboxState.EXITED, exit_status=status, exit_reason=reason)

    def print(self, agent_id: str, output: bytes) -> None:
        """Append to the agent's output. Raises KeyError if the agent does not exist."""
        entry = self.sandboxes[agent_id]
        entry.log = (entry.log + output)[-LOG_BYTES:]


async def _no_server(_: SandboxRequest) -> str:
    # Port 9, discard: no server answers there, not even by chance.
    return "http://127.0.0.1:9"


async def _do_nothing(_: str) -> None:
    return


class MemoryBackend(ComputeBackend):
    """Fulfils the contract in memory. `serve` starts a stand-in for the agent, `stop_serving` stops it."""

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
        serve: Callable[[SandboxRequest], Awaitable[str]] = _no_server,
        stop_serving: Callable[[str], Awaitable[None]] = _do_nothing,
        images: bool = False,
    ) -> None:
        self.capabilities = replace(self.capabilities, images=images)
        self.host = host or MemoryHost()
        self._serve = serve
        self._stop_serving = stop_serving

    async def start(self, request: SandboxRequest) -> Sandbox:
        """Add an entry to the host's table, with the address that `serve` gives."""
        if request.gpu_quota_mb:
            raise SandboxRefused("gpu_quota: a backend in memory has no GPU; omit it or set it to 0", field="gpu_quota")
        if request.image is not None and not self.capabilities.images:
            raise SandboxRefused("image: a backend in memory has no images; omit it", field="image")
        async with self._lock(request.agent_id):
            known = self.host.sandboxes.get(request.agent_id)
            if known:
                return known.sandbox
            if len(self.host.sandboxes) >= self.host.max_sandboxes:
                raise InsufficientResources(f"all {self.host.max_sandboxes} sandboxes of the host are in use")
            self._fail_at("reserve")
            address = await self._serve(request)
            try:
                self._fail_at("serve")
            except SandboxError:
                await self._stop_serving(request.agent_id)
                raise
            sandbox = Sandbox(request.agent_id, address, SandboxState.RUNNING, started_at=time.time())
            self.host.sandboxes[request.agent_id] = MemorySandbox(request, sandbox)
            return sandbox

    async def stop(self, agent_id: str, *, grace: float = 10.0) -> None:
        """Stop the stand-in for the agent, and remove the entry."""
        async with self._lock(agent_id):
            if agent_id in self.host.sandboxes:
                await self._stop_serving(agent_id)
                del self.host.sandboxes[agent_id]

    async def inspect(self, agent_id: str) -> Sandbox | None:
        """Return the sandbox, None if there is none."""
        entry = self.host.sandboxes.get(agent_id)
        return entry.sandbox if entry else None

    async def list(self) -> list[Sandbox]:
        """Return all sandboxes of the host."""
        return [entry.sandbox for entry in self.host.sandboxes.values()]

    async def logs(self, agent_id: str, *, limit: int = 65536) -> bytes:
        """Return the end of the output that `MemoryHost.print` appended."""
        entry = self.host.sandboxes.get(agent_id)
        return entry.log[-limit:] if entry and limit > 0 else b""

    async def usage(self) -> HostUsage:
        """Return the requested resources, of a host that has plenty."""
        requests = [entry.request for entry in self.host.sandboxes.values()]
        charged = self.host.charged_mb
        return HostUsage(
            cores=1 << 16,
            cores_used=sum(request.cores for request in requests),
            memory_mb=1 << 24,
            memory_used_mb=sum(request.memory_mb for request in requests),
            sandboxes=len(requests),
            disk_mb=1 << 24,
            load=0.5,
            memory_free_mb=1 << 23,
            disk_free_mb=1 << 22,
            agents_memory={
                request.agent_id: MemoryAccount(request.memory_mb, charged[request.agent_id])
                for request in requests
                if charged is not None and request.agent_id in charged
            },
            templates_memory=None if charged is None else MemoryAccount(100, charged.get("templates", 0)),
        )

    def _lock(self, agent_id: str) -> asyncio.Lock:
        return self.host.locks.setdefault(agent_id, asyncio.Lock())

    def _fail_at(self, step: str) -> None:
        if self.host.fails_at == step:
            raise SandboxError(f"the test makes every start fail at the step {step}")
