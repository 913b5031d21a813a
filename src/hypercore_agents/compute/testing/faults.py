"""A backend that wraps another and misbehaves on request: one kind of fault for each way in which hosts fail.

A fault is set for an operation, for one agent or for all, for ever or for a number of calls. The wrapped backend
stays true: a test compares what the platform believes with what `inner` says.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from hypercore_agents.compute.base import ComputeBackend, HostUsage, Sandbox, SandboxError, SandboxRequest, SandboxState

CALLS_KEPT = 10_000
"""How many of the last calls `FaultBackend.calls` holds."""


class Operation(StrEnum):
    """The operations of a backend."""

    START = "start"
    STOP = "stop"
    INSPECT = "inspect"
    LIST = "list"
    LOGS = "logs"


_READING = frozenset({Operation.INSPECT, Operation.LIST, Operation.LOGS})


class FaultKind(StrEnum):
    """How an operation goes wrong."""

    SLOW = "slow"
    """It waits `Fault.seconds`, or until `FaultBackend.release`, then works."""
    NEVER = "never"
    """It does nothing and never answers."""
    FAILS = "fails"
    """It does nothing and raises."""
    FAILS_AFTER = "fails_after"
    """It works, and raises all the same: the answer was lost."""
    LIES = "lies"
    """It does nothing and says that it worked. `inspect` shows a running sandbox that does not exist."""
    FORGETS = "forgets"
    """`list` leaves the agent out, `inspect` does not know it, `logs` are empty; it goes on running."""


@dataclass
class Fault:
    """One fault. `times`: how often it strikes (None: always). `seconds`: for SLOW; None waits for `release`."""

    kind: FaultKind
    times: int | None = None
    seconds: float | None = None
    error: Exception | None = None


class Call(NamedTuple):
    """One call as it arrived; `agent_id` is None for `list`."""

    operation: Operation
    agent_id: str | None


class FaultBackend(ComputeBackend):
    """Passes everything on to `inner`, but where a fault is set."""

    def __init__(self, inner: ComputeBackend) -> None:
        self.inner = inner
        self.name = inner.name
        self.capabilities = inner.capabilities
        self.calls: deque[Call] = deque(maxlen=CALLS_KEPT)
        self._faults: dict[Call, Fault] = {}
        self._released = asyncio.Event()

    def inject(self, operation: Operation, fault: Fault, *, agent_id: str | None = None) -> None:
        """Set a fault, for one agent or (None) for all; it replaces the one set there before.

        Raises ValueError for a fault that the operation cannot have.
        """
        if fault.kind is FaultKind.FORGETS and operation not in _READING:
            raise ValueError(f"{operation} cannot forget: choose inspect, list or logs")
        if fault.kind is FaultKind.FAILS_AFTER and operation in _READING:
            raise ValueError(f"{operation} changes nothing, so failing afterwards is FAILS")
        if operation is Operation.LIST and agent_id is not None and fault.kind is not FaultKind.FORGETS:
            raise ValueError("list asks for no agent: with an agent_id it can only forget")
        self._faults[Call(operation, agent_id)] = fault

    def heal(self) -> None:
        """Remove all faults; calls that wait for `release` go on."""
        self._faults.clear()
        self.release()

    def release(self) -> None:
        """Let the calls go on that SLOW holds without a time."""
        self._released.set()
        self._released = asyncio.Event()

    async def start(self, request: SandboxRequest) -> Sandbox:
        """Start, or fail to, or only say so."""
        fault = await self._strike(Operation.START, request.agent_id)
        if fault and fault.kind is FaultKind.LIES:
            return _invented(request.agent_id)
        sandbox = await self.inner.start(request)
        _raise_after(fault)
        return sandbox

    async def stop(self, agent_id: str, *, grace: float = 10.0) -> None:
        """Stop, or fail to, or only say so."""
        fault = await self._strike(Operation.STOP, agent_id)
        if fault and fault.kind is FaultKind.LIES:
            return
        await self.inner.stop(agent_id, grace=grace)
        _raise_after(fault)

    async def inspect(self, agent_id: str) -> Sandbox | None:
        """Look, or forget, or invent a sandbox."""
        fault = await self._strike(Operation.INSPECT, agent_id)
        if fault and fault.kind is FaultKind.FORGETS:
            return None
        if fault and fault.kind is FaultKind.LIES:
            return _invented(agent_id)
        return await self.inner.inspect(agent_id)

    async def list(self) -> list[Sandbox]:
        """List, without the agents that are to be forgotten; a lie is an empty list."""
        fault = await self._strike(Operation.LIST, None)
        if fault and fault.kind in (FaultKind.FORGETS, FaultKind.LIES):
            return []
        seen = await self.inner.list()
        # `list` names no agent, so what is set for one agent strikes here and not in `_strike`.
        return [sandbox for sandbox in seen if not self._take(Call(Operation.LIST, sandbox.agent_id))]

    async def logs(self, agent_id: str, *, limit: int = 65536) -> bytes:
        """Read, or find nothing."""
        fault = await self._strike(Operation.LOGS, agent_id)
        if fault and fault.kind in (FaultKind.FORGETS, FaultKind.LIES):
            return b""
        return await self.inner.logs(agent_id, limit=limit)

    async def usage(self) -> HostUsage | None:
        """Return what the inner backend counts."""
        return await self.inner.usage()

    async def close(self) -> None:
        """Close the inner backend, too."""
        self.release()
        await self.inner.close()

    async def _strike(self, operation: Operation, agent_id: str | None) -> Fault | None:
        self.calls.append(Call(operation, agent_id))
        fault = self._take(Call(operation, agent_id))
        if fault is None and agent_id is not None:
            fault = self._take(Call(operation, None))
        if fault is None:
            return None
        if fault.kind is FaultKind.SLOW:
            await (self._released.wait() if fault.seconds is None else asyncio.sleep(fault.seconds))
        elif fault.kind is FaultKind.NEVER:
            await asyncio.Event().wait()
        elif fault.kind is FaultKind.FAILS:
            raise _error(fault)
        return fault

    def _take(self, call: Call) -> Fault | None:
        fault = self._faults.get(call)
        if fault is None or fault.times is None:
            return fault
        fault.times -= 1
        if fault.times <= 0:
            del self._faults[call]
        return fault


def _error(fault: Fault) -> Exception:
    return fault.error or SandboxError("the test lets this operation fail")


def _raise_after(fault: Fault | None) -> None:
    if fault and fault.kind is FaultKind.FAILS_AFTER:
        raise _error(fault)


def _invented(agent_id: str) -> Sandbox:
    return Sandbox(agent_id, "http://127.0.0.1:9", SandboxState.RUNNING, started_at=0.0)
