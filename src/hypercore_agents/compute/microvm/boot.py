"""Boots a VM with a watchdog: a boot that hangs is killed and retried.

Under emulation a boot sometimes hangs although the image is correct (a clock that cannot be calibrated). The only sign
is a missing message: the guest sends `waiting-for-identity` when it is up, and without it after `seconds` the boot
counts as hung. A VM that exits is not retried: its image or command line is wrong, and a retry would hide that.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import structlog

from hypercore_agents.compute.base import SandboxError

_log = structlog.get_logger(__name__)


class Booting(Protocol):
    """A VM whose QEMU runs."""

    async def wait_until_up(self, seconds: float) -> None:
        """Return when the guest waits for its identity. Raises TimeoutError, or SandboxError if the VM ended."""

    async def kill(self) -> None:
        """End the VM; return when all its processes are gone."""


B = TypeVar("B", bound=Booting)


async def boot(start: Callable[[], Awaitable[B]], *, seconds: float, tries: int) -> B:
    """Return a VM that is up; `start` starts its QEMU. Raises SandboxError and leaves no VM."""
    for attempt in range(1, tries + 1):
        machine = await start()
        try:
            await machine.wait_until_up(seconds)
        except TimeoutError:
            _log.warning("microvm.boot_hung", attempt=attempt, seconds=seconds)
            await machine.kill()
        except BaseException:
            await machine.kill()
            raise
        else:
            return machine
    raise SandboxError(f"the virtual machine hung during {tries} boots of {seconds:.0f} s each; see its console")
