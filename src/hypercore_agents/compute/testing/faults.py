"""A backend that wraps another and injects faults, one kind for each way in which hosts fail.

A fault applies to an operation, for one agent or all agents, to every call or a number of calls. The wrapped backend
always has the true state, so a test can compare the platform's state with that of `inner`.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from hypercore_agents.compute.base import ComputeBackend, HostUsage, Sandbox, SandboxError, SandboxRequest, SandboxState

RECORDED_CALLS = 10_000
"""Number of the last calls that `FaultBackend.calls` holds."""


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
    """It waits `Fault.seconds`, or until `FaultBackend.release`, then succeeds."""
    NEVER = "never"
    """It does nothing and never returns."""
    FAILS = "fails"
    """It does nothing and raises."""
    FAILS_AFTER = "fails_after"
    """It succeeds and then raises, as if the answer was lost."""
    LIES = "lies"
    """It does nothing and reports success. `inspect` returns a running sandbox that does not exist."""
    FORGETS = "forgets"
    """`list` omits the agent, `inspect` returns None, `logs` is empty; the agent continues to run."""


@dataclass
class Fault:
    """One fault. `times`: number of calls it applies to (None: all). `seconds`: for SLOW; None waits for `release`."""

    kind: FaultKind
    times: int | None = None
    seconds: float | None = None
    error: Exception | None = None


class Call(NamedTuple):
    """One received call; `agent_id` is None for `list`."""

    operation: Operation
    agent_id: str | None


class FaultBackend(ComputeBackend):
    """Passes every call on to `inner`, unless a fault applies."""

    def __init__(self, inner: ComputeBackend) -> None:
        self.inner = inner
        self.name = inner.name
        self.capabilities = inner.capabilities
        self.calls: deque[Call] = deque(maxlen=RECORDED_CALLS)
        self._faults: dict[Call, Fault] = {}
        self._released = asyncio.Event()

    def inject(self, operation: Operation, fault: Fault, *, agent_id: str | None = None) -> None:
        """Set a fault for one agent, or for all (None). It replaces an earlier fault of the same operation and agent.

        Raises ValueError for a fault that the operation cannot have.
        """
        if fault.kind is FaultKind.FORGETS and operation not in _READING:
            raise ValueError(f"{operation} cannot forget: choose inspect, list or logs")
        if fault.kind is FaultKind.FAILS_AFTER and operation in _READING:
            raise ValueError(f"{operation} changes nothing, so failing afterwards is FAILS")
        if operation is Operation.LIST and agent_id is not None and fault.kind is not FaultKind.FORGETS:
            raise ValueError("list has no agent_id: for one agent it can only forget")
        self._faults[Call(operation, agent_id)] = fault

    def heal(self) -> None:
        """Remove all faults; calls that wait for `release` continue."""
        self._faults.clear()
        self.release()

    def release(self) -> None:
        """Let the calls continue that SLOW delays without a time."""
        self._released.set()
        self._released = asyncio.Event()

    async def start(self, request: SandboxRequest) -> Sandbox:
        """Start the sandbox, unless a fault applies."""
        fault = await self._apply(Operation.START, request.agent_id)
        if fault and fault.kind is FaultKind.LIES:
            return _invented(request.agent_id)
        sandbox = await self.inner.start(request)
        _raise_after(fault)
        return sandbox

    async def stop(self, agent_id: str, *, grace: float = 10.0) -> None:
        """Stop the sandbox, unless a fault applies."""
        fault = await self._apply(Operation.STOP, agent_id)
        if fault and fault.kind is FaultKind.LIES:
            return
        await self.inner.stop(agent_id, grace=grace)
        _raise_after(fault)

    async def inspect(self, agent_id: str) -> Sandbox | None:
        """Inspect the sandbox; with a fault, return None or a sandbox that does not exist."""
        fault = await self._apply(Operation.INSPECT, agent_id)
        if fault and fault.kind is FaultKind.FORGETS:
            return None
        if fault and fault.kind is FaultKind.LIES:
            return _invented(agent_id)
        return await self.inner.inspect(agent_id)

    async def list(self) -> list[Sandbox]:
        """List the sandboxes except forgotten ones; a lie is an empty list."""
        fault = await self._apply(Operation.LIST, None)
        if fault and fault.kind in (FaultKind.FORGETS, FaultKind.LIES):
            return []
        seen = await self.inner.list()
        # `list` has no agent_id, so faults of one agent apply here and not in `_apply`.
        return [sandbox for sandbox in seen if not self._take(Call(Operation.LIST, sandbox.agent_id))]

    async def logs(self, agent_id: str, *, limit: int = 65536) -> bytes:
        """Return the logs, unless a fault applies."""
        fault = await self._apply(Operation.LOGS, agent_id)
        if fault and fault.kind in (FaultKind.FORGETS, FaultKind.LIES):
            return b""
        return await self.inner.logs(agent_id, limit=limit)

    async def usage(self) -> HostUsage | None:
        """Return the usage of the inner backend."""
        return await self.inner.usage()

    async def close(self) -> None:
        """Release waiting calls and close the inner backend."""
        self.release()
        await self.inner.close()

    async def _apply(self, operation: Operation, agent_id: str | None) -> Fault | None:
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
    return fault.error or SandboxError("the test makes this operation fail")


def _raise_after(fault: Fault | None) -> None:
    if fault and fault.kind is FaultKind.FAILS_AFTER:
        raise _error(fault)


def _invented(agent_id: str) -> Sandbox:
    return Sandbox(agent_id, "http://127.0.0.1:9", SandboxState.RUNNING, started_at=0.0)
