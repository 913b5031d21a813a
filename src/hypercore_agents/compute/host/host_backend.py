"""The part of a backend that is the same for all backends of this host: observing, stopping, logs, locks, threads.

A backend's whole state is in the sandboxes' directories and in the kernel. The object itself holds only locks and
threads, so any other object over the same state directory, in this process, in another or after a restart, continues
where it stopped.

Blocking work (files, /proc, starting processes) runs in a few threads of the backend; waiting for a sandbox to end runs
on the event loop, by a pidfd, so any number of stops can wait at the same time.
"""

import signal
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from hypercore_agents.compute.base import ComputeBackend, Sandbox, SandboxError
from hypercore_agents.compute.host.blocking_work import Workers, wait_until_done
from hypercore_agents.compute.host.identity import ProcessIdentity, pidfd_of, send_signal, wait_until_ended
from hypercore_agents.compute.host.locks import AgentLocks
from hypercore_agents.compute.host.observing import observe
from hypercore_agents.compute.host.request_checks import is_agent_id
from hypercore_agents.compute.host.sandbox_directory import SandboxDirectory

D = TypeVar("D", bound=SandboxDirectory[Any])


class HostBackend(ComputeBackend, Generic[D]):
    """A backend that runs sandboxes on this host. Subclasses add `start`, `usage` and the removal of a sandbox."""

    directory_type: type[D]

    def __init__(self, folder: Path, threads: int) -> None:
        """Keep sandboxes and locks below `folder`; `threads` is how many starts and removals run at the same time."""
        self._sandboxes = folder / "sandboxes"
        self._lock_files = folder / "locks"
        self._locks = AgentLocks(self._lock_files)
        self._workers = Workers(threads, f"{self.name}-backend", folder)
        self._sandboxes_mode = 0o700

    @abstractmethod
    def _destroy(self, directory: D, record: Any) -> None:
        """Remove a sandbox and all that belongs to it. Blocks. Raises SandboxError."""

    async def stop(self, agent_id: str, *, grace: float = 10.0) -> None:
        """Signal the agent to end, wait, kill what remains, and remove the sandbox's files, groups and user."""
        if not is_agent_id(agent_id) or not await self._workers.run(self._exists, agent_id):
            return
        await self._workers.run(self._make_directories)
        async with self._locks.hold(agent_id):
            with self._workers.translated_errors():
                directory = self._directory(agent_id)
                record = await self._workers.run(directory.read)
                if record is None:
                    return
                if grace > 0 and record.complete and record.shim is not None:
                    await _end_gracefully(record.shim, grace)
                await self._workers.run(self._destroy, directory, record)

    async def inspect(self, agent_id: str) -> Sandbox | None:
        """Return the sandbox by its record, its exit file and the kernel."""
        if not is_agent_id(agent_id):
            return None
        return await self._workers.run(self._observe, self._directory(agent_id))

    async def list(self) -> list[Sandbox]:
        """Return all sandboxes under the state directory, whichever manager started them."""
        return [*await self._workers.run(self._observe_all)]

    async def logs(self, agent_id: str, *, limit: int = 65536) -> bytes:
        """Return the end of the output, of which at least the last half of `log_bytes` is stored."""
        if not is_agent_id(agent_id):
            return b""
        return await self._workers.run(self._directory(agent_id).tail, limit)

    async def close(self) -> None:
        """End the threads. Sandboxes continue to run."""
        await self._workers.close()

    async def _destroy_abandoned(self, directory: D) -> None:
        """Remove a sandbox whose start was cancelled. If that fails, the sandbox stays in `list`."""
        removal = self._workers.submit(self._destroy_on_record, directory)
        await wait_until_done(removal)
        # Retrieved but not raised: the caller has been cancelled.
        removal.exception()

    # The methods below block and run in threads.

    def _destroy_on_record(self, directory: D) -> None:
        record = directory.read()
        if record is not None:
            self._destroy(directory, record)

    def _observe(self, directory: D) -> Sandbox | None:
        record = directory.read()
        if record is not None and not record.complete and self._locks.is_held(directory.agent_id):
            # A start or removal is under way, unless it has just finished: read the record again.
            record = directory.read()
            if record is None or not record.complete:
                return None
        return observe(directory, record) if record else None

    def _observe_all(self) -> tuple[Sandbox, ...]:
        found = (self._observe(directory) for directory in self._directories())
        return tuple(sorted((sandbox for sandbox in found if sandbox), key=lambda sandbox: sandbox.started_at))

    def _exists(self, agent_id: str) -> bool:
        return self._directory(agent_id).path.exists() or self._locks.is_held(agent_id)

    def _directory(self, agent_id: str) -> D:
        return self.directory_type(self._sandboxes / agent_id)

    def _directories(self) -> Iterator[D]:
        return self.directory_type.all_in(self._sandboxes)

    def _make_directories(self) -> None:
        try:
            _make_directory(self._sandboxes, self._sandboxes_mode)
            _make_directory(self._lock_files, 0o700)
        except OSError as error:
            raise SandboxError(f"cannot create {self._sandboxes}: {error.strerror}; check STATE_DIR") from error


def _make_directory(path: Path, mode: int) -> None:
    """Create a directory, and its missing parents, with exactly this mode, whatever the umask is."""
    if not path.parent.exists():
        _make_directory(path.parent, mode)
    path.mkdir(exist_ok=True)
    path.chmod(mode)


async def _end_gracefully(shim: ProcessIdentity, grace: float) -> None:
    """Send SIGTERM to the shim, which passes it on, and wait up to `grace` seconds until agent and shim have ended."""
    with pidfd_of(shim) as pidfd:
        if pidfd is not None:
            send_signal(pidfd, signal.SIGTERM)
    await wait_until_ended(shim, grace)
