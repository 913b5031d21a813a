"""Each fault of the fault backend applies to the right agents and the right number of calls."""

import asyncio

import pytest

from hypercore_agents.api.ids import new_agent_id
from hypercore_agents.compute.base import InsufficientResources, SandboxError, SandboxRequest, SandboxState
from hypercore_agents.compute.testing import Call, Fault, FaultBackend, FaultKind, MemoryBackend, MemoryHost, Operation


def request(agent_id: str | None = None) -> SandboxRequest:
    return SandboxRequest(agent_id or new_agent_id(), 1, 128, "http://127.0.0.1:9", "s" * 40)


@pytest.fixture
def backend() -> FaultBackend:
    return FaultBackend(MemoryBackend())


async def test_a_failing_start_starts_nothing(backend: FaultBackend) -> None:
    backend.inject(Operation.START, Fault(FaultKind.FAILS))
    with pytest.raises(SandboxError):
        await backend.start(request())
    assert await backend.inner.list() == []


async def test_a_start_can_fail_after_it_has_started_the_sandbox(backend: FaultBackend) -> None:
    wanted = request()
    backend.inject(Operation.START, Fault(FaultKind.FAILS_AFTER, error=InsufficientResources("lost")))
    with pytest.raises(InsufficientResources, match="lost"):
        await backend.start(wanted)
    assert await backend.inner.inspect(wanted.agent_id) is not None


async def test_a_lying_start_reports_a_running_sandbox(backend: FaultBackend) -> None:
    backend.inject(Operation.START, Fault(FaultKind.LIES))
    sandbox = await backend.start(request())
    assert sandbox.state is SandboxState.RUNNING
    assert await backend.inspect(sandbox.agent_id) is None
    assert await backend.list() == []


async def test_a_lying_stop_stops_nothing(backend: FaultBackend) -> None:
    sandbox = await backend.start(request())
    backend.inject(Operation.STOP, Fault(FaultKind.LIES))
    await backend.stop(sandbox.agent_id)
    assert await backend.inner.inspect(sandbox.agent_id) == sandbox


async def test_a_stop_can_fail_after_it_has_removed_the_sandbox(backend: FaultBackend) -> None:
    sandbox = await backend.start(request())
    backend.inject(Operation.STOP, Fault(FaultKind.FAILS_AFTER))
    with pytest.raises(SandboxError):
        await backend.stop(sandbox.agent_id)
    assert await backend.inner.list() == []


async def test_a_lying_inspect_returns_a_sandbox_that_does_not_exist(backend: FaultBackend) -> None:
    backend.inject(Operation.INSPECT, Fault(FaultKind.LIES))
    seen = await backend.inspect(new_agent_id())
    assert seen is not None
    assert seen.state is SandboxState.RUNNING


async def test_a_backend_can_forget_one_agent_or_all(backend: FaultBackend) -> None:
    forgotten, other = await backend.start(request()), await backend.start(request())
    backend.inject(Operation.LIST, Fault(FaultKind.FORGETS), agent_id=forgotten.agent_id)
    backend.inject(Operation.INSPECT, Fault(FaultKind.FORGETS), agent_id=forgotten.agent_id)
    backend.inject(Operation.LOGS, Fault(FaultKind.FORGETS), agent_id=forgotten.agent_id)
    assert await backend.list() == [other]
    assert await backend.inspect(forgotten.agent_id) is None
    assert await backend.logs(forgotten.agent_id) == b""
    assert await backend.inspect(other.agent_id) == other
    backend.inject(Operation.LIST, Fault(FaultKind.FORGETS))
    assert await backend.list() == []
    backend.heal()
    assert await backend.list() == [forgotten, other]


async def test_a_fault_applies_to_one_agent_for_a_number_of_calls(backend: FaultBackend) -> None:
    wanted = request()
    backend.inject(Operation.START, Fault(FaultKind.FAILS, times=2), agent_id=wanted.agent_id)
    await backend.start(request())
    for _ in range(2):
        with pytest.raises(SandboxError):
            await backend.start(wanted)
    assert (await backend.start(wanted)).agent_id == wanted.agent_id
    assert list(backend.calls)[-1] == Call(Operation.START, wanted.agent_id)


async def test_a_hanging_operation_can_be_cancelled(backend: FaultBackend) -> None:
    backend.inject(Operation.LIST, Fault(FaultKind.NEVER))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(backend.list(), 0.01)


async def test_a_slow_operation_succeeds_after_release(backend: FaultBackend) -> None:
    backend.inject(Operation.START, Fault(FaultKind.SLOW))
    start = asyncio.create_task(backend.start(request()))
    while not backend.calls:
        await asyncio.sleep(0)
    assert not start.done()
    assert await backend.inner.list() == []
    backend.release()
    assert (await start).state is SandboxState.RUNNING


async def test_a_slow_operation_can_have_a_fixed_delay(backend: FaultBackend) -> None:
    backend.inject(Operation.START, Fault(FaultKind.SLOW, seconds=0.001))
    assert (await backend.start(request())).state is SandboxState.RUNNING


@pytest.mark.parametrize(
    ("operation", "kind", "agent_id"),
    [
        (Operation.START, FaultKind.FORGETS, None),
        (Operation.LOGS, FaultKind.FAILS_AFTER, None),
        (Operation.LIST, FaultKind.FAILS, "agent-0"),
    ],
)
def test_an_impossible_fault_is_rejected(
    backend: FaultBackend, operation: Operation, kind: FaultKind, agent_id: str | None
) -> None:
    with pytest.raises(ValueError, match=operation.value):
        backend.inject(operation, Fault(kind), agent_id=agent_id)


async def test_a_full_memory_host_refuses_a_start() -> None:
    backend = MemoryBackend(MemoryHost(max_sandboxes=1))
    await backend.start(request())
    with pytest.raises(InsufficientResources, match="all 1 sandboxes"):
        await backend.start(request())


async def test_a_memory_backend_starts_and_stops_its_server() -> None:
    served: list[str] = []

    async def serve(wanted: SandboxRequest) -> str:
        served.append(wanted.agent_id)
        return "http://127.0.0.1:12345"

    async def cease(agent_id: str) -> None:
        served.remove(agent_id)

    backend = MemoryBackend(serve=serve, stop_serving=cease)
    sandbox = await backend.start(request())
    assert sandbox.address == "http://127.0.0.1:12345"
    assert served == [sandbox.agent_id]
    await backend.stop(sandbox.agent_id)
    assert served == []
