"""Booting a VM with a watchdog: a boot that hangs is killed and tried again.

Under emulation a boot hangs now and then for no fault of the image (a clock that cannot be calibrated). It shows by
silence alone: the guest says `waiting-for-identity` when it is up, and one that has not after `seconds` is taken for
hung. A VM that ends by itself is another matter: its image or command line is wrong, and trying again would hide it.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import structlog

from hypercore_agents.compute.base import SandboxError

_log = structlog.get_logger(__name__)


class Booting(Protocol):
    """A VM whose QEMU runs."""

    async def wait_until_up(self, seconds: float) -> None:
        """Return when the guest waits for its identity. Raises TimeoutError, or SandboxError when it ended."""

    async def kill(self) -> None:
        """End the VM; return when nothing of it is left."""


B = TypeVar("B", bound=Booting)


async def boot(begin: Callable[[], Awaitable[B]], *, seconds: float, tries: int) -> B:
    """Return a VM that is up; `begin` starts its QEMU. Raises SandboxError, and then none is left."""
    for attempt in range(1, tries + 1):
        machine = await begin()
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
    raise SandboxError(f"the virtual machine hung while it booted, {tries} times for {seconds:.0f} s; see its console")
