# ruff: noqa: D102 (the names of tests are their documentation)
"""The suite that every backend passes: it checks the guarantees in `compute/base.py`.

Subclass `BackendConformance` in a test module, in a class whose name begins with `Test`, and give it a `subject`
fixture that yields a `Subject`. The suite uses the contract; the subject provides only operations that the contract
does not have (let the agent exit, let it print, make a start fail). Tests wait for conditions, never for a fixed time.
"""

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import replace
from typing import TypeVar

import pytest

from hypercore_agents.api.ids import new_agent_id
from hypercore_agents.compute.base import (
    ComputeBackend,
    Sandbox,
    SandboxError,
    SandboxRefused,
    SandboxRequest,
    SandboxState,
)

T = TypeVar("T")
SECRET = "enrolment-secret-of-a-test-0123456789abcdef"  # noqa: S105
"""The enrolment secret of every request that the suite makes."""


class Subject(ABC):
    """A backend under test, and the operations that the contract does not have."""

    backend: ComputeBackend
    log_limit: int
    """Maximum of an agent's output that the backend stores, in bytes."""

    @abstractmethod
    def successor(self) -> ComputeBackend:
        """Return another backend object over the same state, as a restarted manager would have."""

    @abstractmethod
    async def end(self, sandbox: Sandbox, status: int) -> None:
        """Let the agent exit with this status."""

    @abstractmethod
    async def print(self, sandbox: Sandbox, text: str, times: int = 1) -> None:
        """Let the agent print the text a number of times."""

    @abstractmethod
    def breakages(self) -> Mapping[str, Callable[[], AbstractContextManager[object]]]:
        """Return contexts by name, in each of which a start fails at a different step."""

    async def prepare(self) -> None:
        """Create everything that stays after a first start, so that it exists before and after each test.

        From then on, `residue` must return the same whenever no agent exists.
        """
        return None

    @abstractmethod
    def residue(self) -> frozenset[str]:
        """Return everything that exists because of this backend: processes, files, groups, sockets, users."""

    def request(self, agent_id: str | None = None) -> SandboxRequest:
        """Return a request for a small sandbox."""
        return SandboxRequest(
            agent_id=agent_id or new_agent_id(),
            cores=1,
            memory_mb=512,
            gateway_url="http://127.0.0.1:9",
            enrolment_secret=SECRET,
        )


async def eventually(probe: Callable[[], Awaitable[T]], *, seconds: float = 20.0) -> T:
    """Call `probe` until its answer is true, and return the answer. Raises TimeoutError after `seconds`."""
    async with asyncio.timeout(seconds):
        while not (answer := await probe()):  # noqa: ASYNC110 (what is probed lies in other processes)
            await asyncio.sleep(0.01)
    return answer


class BackendConformance:
    """The guarantees of the contract, one test each."""

    @pytest.fixture(autouse=True)
    async def _check_residue(self, subject: Subject) -> AsyncIterator[None]:
        await subject.prepare()
        before = subject.residue()
        yield
        for sandbox in await subject.backend.list():
            await subject.backend.stop(sandbox.agent_id, grace=0)
        after = subject.residue()
        assert after == before, (after - before, before - after)

    async def test_a_started_agent_is_running(self, subject: Subject) -> None:
        async with _started(subject) as sandbox:
            assert sandbox.state is SandboxState.RUNNING
            assert sandbox.exit_status is None
            assert sandbox.exit_reason is None
            assert re.fullmatch(r"https?://[^/]+:\d+", sandbox.address)
            assert await subject.backend.inspect(sandbox.agent_id) == sandbox
            assert await subject.backend.list() == [sandbox]
            usage = await subject.backend.usage()
            if usage is not None:
                assert usage.sandboxes == 1
                assert usage.disk_free_mb > 0
                assert 0 < usage.memory_free_mb <= usage.memory_mb * 2
                limited = subject.backend.capabilities.enforced_limits
                if "memory" in limited:
                    assert usage.memory_used_mb >= subject.request().memory_mb
                if "cores" in limited:
                    assert usage.cores_used == subject.request().cores

    async def test_starting_again_returns_the_same_sandbox(self, subject: Subject) -> None:
        async with _started(subject) as sandbox:
            assert await subject.backend.start(subject.request(sandbox.agent_id)) == sandbox
            assert await subject.backend.list() == [sandbox]

    async def test_an_exited_agent_is_not_started_again(self, subject: Subject) -> None:
        async with _started(subject) as sandbox:
            exited = await _ended(subject, sandbox, 3)
            assert await subject.backend.start(subject.request(sandbox.agent_id)) == exited

    async def test_a_stopped_agent_is_gone(self, subject: Subject) -> None:
        before = subject.residue()
        async with _started(subject) as sandbox:
            assert subject.residue() > before
            await subject.backend.stop(sandbox.agent_id)
            assert subject.residue() == before
            assert await subject.backend.inspect(sandbox.agent_id) is None
            assert await subject.backend.list() == []
            assert await subject.backend.logs(sandbox.agent_id) == b""
            usage = await subject.backend.usage()
            assert usage is None or (usage.sandboxes, usage.cores_used, usage.disk_used_mb) == (0, 0, 0)

    async def test_an_agent_can_start_again_after_its_stop(self, subject: Subject) -> None:
        async with _started(subject) as sandbox:
            await subject.backend.stop(sandbox.agent_id)
            again = await subject.backend.start(subject.request(sandbox.agent_id))
            assert again.state is SandboxState.RUNNING

    async def test_stopping_a_stopped_or_unknown_agent_succeeds(self, subject: Subject) -> None:
        async with _started(subject) as sandbox:
            await subject.backend.stop(sandbox.agent_id)
            await subject.backend.stop(sandbox.agent_id)
        await subject.backend.stop(new_agent_id())
        await subject.backend.stop("../not-an-id")

    async def test_unknown_agents_have_no_state_and_no_logs(self, subject: Subject) -> None:
        for unknown in (new_agent_id(), "../not-an-id", ""):
            assert await subject.backend.inspect(unknown) is None
            assert await subject.backend.logs(unknown) == b""
        assert await subject.backend.list() == []

    async def test_an_exited_agent_is_listed_until_it_is_stopped(self, subject: Subject) -> None:
        async with _started(subject) as sandbox:
            exited = await _ended(subject, sandbox, 3)
            assert exited.exit_status == 3
            assert exited.exit_reason
            assert (exited.address, exited.started_at) == (sandbox.address, sandbox.started_at)
            assert await subject.backend.list() == [exited]

    async def test_concurrent_starts_return_one_sandbox(self, subject: Subject) -> None:
        request = subject.request()
        try:
            answers = await asyncio.gather(*(subject.backend.start(request) for _ in range(5)))
            assert answers == [answers[0]] * 5
            assert await subject.backend.list() == [answers[0]]
        finally:
            await subject.backend.stop(request.agent_id)

    async def test_starts_by_two_managers_return_one_sandbox(self, subject: Subject) -> None:
        request, successor = subject.request(), subject.successor()
        try:
            ours, theirs = await asyncio.gather(subject.backend.start(request), successor.start(request))
            assert ours == theirs
        finally:
            await asyncio.gather(subject.backend.stop(request.agent_id), successor.stop(request.agent_id))
            await successor.close()

    async def test_concurrent_stops_all_succeed(self, subject: Subject) -> None:
        before = subject.residue()
        async with _started(subject) as sandbox:
            await asyncio.gather(*(subject.backend.stop(sandbox.agent_id) for _ in range(5)))
            assert subject.residue() == before

    async def test_a_concurrent_stop_and_start_do_not_interfere(self, subject: Subject) -> None:
        async with _started(subject) as sandbox:
            _, started = await asyncio.gather(
                subject.backend.stop(sandbox.agent_id), subject.backend.start(subject.request(sandbox.agent_id))
            )
            seen = await subject.backend.inspect(sandbox.agent_id)
            assert seen in (None, started)

    async def test_agents_do_not_affect_one_another(self, subject: Subject) -> None:
        requests = [subject.request() for _ in range(4)]
        sandboxes = await asyncio.gather(*(subject.backend.start(request) for request in requests))
        assert len({sandbox.address for sandbox in sandboxes}) == len(sandboxes) or subject.backend.name == "memory"
        await subject.backend.stop(sandboxes[0].agent_id)
        left = await subject.backend.list()
        assert {sandbox.agent_id for sandbox in left} == {sandbox.agent_id for sandbox in sandboxes[1:]}
        assert {sandbox.state for sandbox in left} == {SandboxState.RUNNING}
        await asyncio.gather(*(subject.backend.stop(sandbox.agent_id) for sandbox in left))

    async def test_a_start_that_fails_at_any_step_leaves_nothing(self, subject: Subject) -> None:
        before = subject.residue()
        breakages = subject.breakages()
        assert breakages
        for step, broken in breakages.items():
            request = subject.request()
            with broken():
                failed = await asyncio.gather(subject.backend.start(request), return_exceptions=True)
            assert isinstance(failed[0], SandboxError), f"a start that fails at {step} returned {failed[0]!r}"
            assert subject.residue() == before, f"left by a start that failed at {step}"
            assert await subject.backend.inspect(request.agent_id) is None
            started = await subject.backend.start(request)
            assert started.state is SandboxState.RUNNING, f"a start after one that failed at {step}"
            await subject.backend.stop(request.agent_id)

    async def test_a_start_that_is_cancelled_leaves_nothing(self, subject: Subject) -> None:
        before = subject.residue()

        async def at_once() -> bool:
            return True

        async def after_the_first_step() -> bool:
            return start.done() or subject.residue() != before

        for moment in (at_once, after_the_first_step, *[at_once] * 5):
            request = subject.request()
            start = asyncio.create_task(subject.backend.start(request))
            await eventually(moment)
            await asyncio.sleep(0)
            if start.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await start
                assert await subject.backend.inspect(request.agent_id) is None
                after = subject.residue()
                assert after == before, (after - before, before - after)
            await subject.backend.stop(request.agent_id)

    async def test_a_successor_takes_over(self, subject: Subject) -> None:
        before = subject.residue()
        running, ended = await asyncio.gather(*(subject.backend.start(subject.request()) for _ in range(2)))
        await subject.print(running, "hello")
        await _logged(subject, running, b"hello")
        exited = await _ended(subject, ended, 4)
        await subject.backend.close()
        subject.backend = subject.successor()
        assert await subject.backend.inspect(running.agent_id) == running
        assert {sandbox.agent_id: sandbox for sandbox in await subject.backend.list()} == {
            running.agent_id: running,
            ended.agent_id: exited,
        }
        assert await subject.backend.start(subject.request(running.agent_id)) == running
        assert b"hello" in await subject.backend.logs(running.agent_id)
        await subject.backend.stop(running.agent_id)
        await subject.backend.stop(ended.agent_id)
        assert subject.residue() <= before

    async def test_logs_are_stored_and_bounded(self, subject: Subject) -> None:
        async with _started(subject) as sandbox:
            await subject.print(sandbox, "first\n")
            await _logged(subject, sandbox, b"first\n")
            line = "x" * 999 + "\n"
            await subject.print(sandbox, line, times=3 * subject.log_limit // len(line))
            await subject.print(sandbox, "last\n")
            await _logged(subject, sandbox, b"last\n")
            everything = await subject.backend.logs(sandbox.agent_id, limit=10 * subject.log_limit)
            assert b"first" not in everything
            assert subject.log_limit // 2 - len(line) <= len(everything) <= subject.log_limit
            assert await subject.backend.logs(sandbox.agent_id, limit=5) == b"last\n"
            assert await subject.backend.logs(sandbox.agent_id, limit=0) == b""
            await _ended(subject, sandbox, 0)
            assert await subject.backend.logs(sandbox.agent_id, limit=5) == b"last\n"

    async def test_a_gpu_is_refused_with_its_field(self, subject: Subject) -> None:
        if subject.backend.capabilities.gpu:
            return
        with pytest.raises(SandboxRefused, match="gpu_quota") as refusal:
            await subject.backend.start(replace(subject.request(), gpu_quota_mb=1024))
        assert refusal.value.details == {"field": "gpu_quota"}
        assert await subject.backend.list() == []

    async def test_an_unsupported_image_is_refused_with_its_field(self, subject: Subject) -> None:
        if subject.backend.capabilities.images:
            return
        with pytest.raises(SandboxRefused, match="image") as refusal:
            await subject.backend.start(replace(subject.request(), image="agent:2"))
        assert refusal.value.details == {"field": "image"}
        assert await subject.backend.list() == []

    async def test_a_gpu_quota_of_zero_is_accepted(self, subject: Subject) -> None:
        request = replace(subject.request(), gpu_quota_mb=0)
        await subject.backend.start(request)
        await subject.backend.stop(request.agent_id)

    async def test_capabilities_have_valid_values(self, subject: Subject) -> None:
        capabilities = subject.backend.capabilities
        assert subject.backend.name
        assert capabilities.isolation
        assert capabilities.enforced_limits <= {"cores", "memory", "pids"}

    async def test_errors_and_requests_do_not_show_the_secret(self, subject: Subject) -> None:
        request = subject.request()
        assert SECRET not in repr(request)
        for step, broken in subject.breakages().items():
            with broken(), pytest.raises(SandboxError) as failure:
                await subject.backend.start(request)
            assert SECRET not in f"{failure.value!r}{failure.value}", step


@asynccontextmanager
async def _started(subject: Subject) -> AsyncIterator[Sandbox]:
    sandbox = await subject.backend.start(subject.request())
    try:
        yield sandbox
    finally:
        await subject.backend.stop(sandbox.agent_id, grace=0)


async def _ended(subject: Subject, sandbox: Sandbox, status: int) -> Sandbox:
    await subject.end(sandbox, status)

    async def exited() -> Sandbox | None:
        seen = await subject.backend.inspect(sandbox.agent_id)
        return seen if seen and seen.state is SandboxState.EXITED else None

    seen = await eventually(exited)
    assert seen is not None
    return seen


async def _logged(subject: Subject, sandbox: Sandbox, text: bytes) -> None:
    async def printed() -> bool:
        return text in await subject.backend.logs(sandbox.agent_id, limit=10 * subject.log_limit)

    await eventually(printed)
