"""Locks that allow one operation per agent at a time, in this process and among managers that share a state directory.

Two locks are nested: an asyncio lock, in which the operations of this process queue fairly, and flock(2) on a file,
which excludes other managers and which the kernel releases when its holder dies. The file exists only while it is
locked: the holder deletes it before it unlocks. A lock is therefore valid only if the locked file is still at its path.

Rejected: permanent lock files (their number only grows); fcntl(2) record locks (another thread that closes the same
file releases them).
"""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from weakref import WeakValueDictionary

from hypercore_agents.compute.base import SandboxError

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5


class AgentLocks:
    """The locks of all agents under one directory."""

    def __init__(self, directory: Path, *, patience: float = 60.0) -> None:
        """Keep the lock files in `directory`; wait at most `patience` seconds for another process."""
        self._directory = directory
        self._patience = patience
        self._queues: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def hold(self, agent_id: str) -> AsyncIterator[None]:
        """Hold the agent's lock. Raises SandboxError if another process does not release it in time."""
        queue = self._queues.setdefault(agent_id, asyncio.Lock())
        async with queue:
            path = self._directory / agent_id
            descriptor = await self._acquire(path)
            try:
                yield
            finally:
                try:
                    path.unlink(missing_ok=True)
                finally:
                    os.close(descriptor)

    def is_held(self, agent_id: str) -> bool:
        """Return whether any process holds the agent's lock."""
        try:
            descriptor = os.open(self._directory / agent_id, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    async def _acquire(self, path: Path) -> int:
        pause = _FIRST_PAUSE
        try:
            async with asyncio.timeout(self._patience):
                while (descriptor := _try_lock(path)) is None:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
        except TimeoutError:
            raise SandboxError(
                f"another process has held the lock of {path.name} for {self._patience:.0f} s; try again"
            ) from None
        except OSError as error:
            raise SandboxError(f"cannot lock {path.name}: {error.strerror}") from error
        return descriptor


def _try_lock(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False)):
                return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
