"""The backend in memory fulfils the contract, alone and behind a fault backend without faults."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import pytest

from hypercore_agents.compute.base import ComputeBackend, Sandbox
from hypercore_agents.compute.testing import FaultBackend, MemoryBackend, MemoryHost
from hypercore_agents.compute.testing.conformance import BackendConformance, Subject
from hypercore_agents.compute.testing.memory import LOG_BYTES


class MemorySubject(Subject):
    log_limit = LOG_BYTES

    def __init__(self) -> None:
        self.host = MemoryHost()
        self.backend = self.successor()

    def successor(self) -> ComputeBackend:
        return MemoryBackend(self.host)

    async def end(self, sandbox: Sandbox, status: int) -> None:
        self.host.exit(sandbox.agent_id, status)

    async def print(self, sandbox: Sandbox, text: str, times: int = 1) -> None:
        self.host.print(sandbox.agent_id, text.encode() * times)

    def breakages(self) -> Mapping[str, Callable[[], AbstractContextManager[object]]]:
        @contextmanager
        def broken(step: str) -> Iterator[None]:
            self.host.fails_at = step
            try:
                yield
            finally:
                self.host.fails_at = None

        return {"reserve": lambda: broken("reserve"), "serve": lambda: broken("serve")}

    def residue(self) -> frozenset[str]:
        return frozenset(self.host.sandboxes)


class FaultSubject(MemorySubject):
    def successor(self) -> ComputeBackend:
        return FaultBackend(super().successor())


class TestMemoryBackend(BackendConformance):
    @pytest.fixture
    def subject(self) -> Subject:
        return MemorySubject()


class TestFaultBackendWithoutFaults(BackendConformance):
    @pytest.fixture
    def subject(self) -> Subject:
        return FaultSubject()
