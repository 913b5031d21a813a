"""Support for tests of both local backends: wait for the end of a sandbox, and make the write of a record fail."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from hypercore_agents.compute.base import ComputeBackend, Sandbox, SandboxState
from hypercore_agents.compute.host.sandbox_directory import SandboxDirectory
from hypercore_agents.compute.testing.conformance import eventually


async def exited(backend: ComputeBackend, sandbox: Sandbox) -> Sandbox:
    """Wait until a sandbox has exited, and return it."""

    async def seen() -> Sandbox | None:
        now = await backend.inspect(sandbox.agent_id)
        return now if now and now.state is SandboxState.EXITED else None

    found = await eventually(seen)
    assert found is not None
    return found


@contextmanager
def failing_write(directory_type: type[SandboxDirectory[Any]], after: int, error: OSError) -> Iterator[None]:
    """Let the write of a record fail after a number of successful ones."""
    write = directory_type.write
    count = 0

    def counted(self: SandboxDirectory[Any], record: Any) -> None:
        nonlocal count
        count += 1
        if count == after + 1:
            raise error
        write(self, record)

    with mock.patch.object(directory_type, "write", counted):
        yield
