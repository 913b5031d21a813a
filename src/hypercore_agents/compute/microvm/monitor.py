"""A client of QEMU's monitor (QMP), used during a start to save, restore and continue a VM.

The socket is one end of a pair whose other end QEMU inherited. It has no name, so no other process can connect to it,
and it is closed after the start. Every command has a deadline; errors become SandboxError with QEMU's message.
"""

import array
import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

from qemu.qmp import QMPClient, QMPError

from hypercore_agents.compute.base import SandboxError

_POLL_SECONDS = 0.01
_MIGRATION_ENDS = frozenset({"completed", "failed", "cancelled"})


class Monitor:
    """A connection to one QEMU."""

    def __init__(self, client: QMPClient, sock: socket.socket, deadline: float) -> None:
        self._client = client
        self._socket = sock
        self._deadline = deadline

    async def run(self, command: str, **arguments: Any) -> Any:
        """Run a command and return its result. Raises SandboxError."""
        try:
            async with asyncio.timeout(self._deadline):
                return await self._client.execute(command, arguments or None)
        except TimeoutError:
            raise SandboxError(f"QEMU did not answer {command} within {self._deadline:.0f} s") from None
        except QMPError as error:
            raise SandboxError(f"QEMU refused {command}: {error}") from error

    async def save(self, state: int) -> None:
        """Stop the VM and write its state, without its memory, to a descriptor. Raises SandboxError."""
        await self.run("stop")
        await self._share_memory()
        try:
            # Not by the client's `send_fd_scm`, which does not work with the sockets of every event loop.
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [state]))
            self._socket.sendmsg([b" "], [rights])
        except OSError as error:
            raise SandboxError(f"QEMU did not accept a descriptor for its state: {error}") from error
        await self.run("getfd", fdname="state")
        await self.run("migrate", uri="fd:state")
        await self._migrated("saving")

    async def restore(self, number: int) -> None:
        """Load the state from QEMU's descriptor of this number, and continue the VM. Raises SandboxError."""
        await self._share_memory()
        await self.run("migrate-incoming", uri=f"fd:{number}")
        await self._migrated("restoring")
        await self.run("cont")

    async def _share_memory(self) -> None:
        shared = {"capability": "x-ignore-shared", "state": True}
        await self.run("migrate-set-capabilities", capabilities=[shared])

    async def _migrated(self, what: str) -> None:
        async with asyncio.timeout(self._deadline):
            while True:
                info = await self.run("query-migrate")
                status = info.get("status")
                if status in _MIGRATION_ENDS:
                    break
                await asyncio.sleep(_POLL_SECONDS)
        if status != "completed":
            why = info.get("error-desc", "QEMU gives no reason")
            raise SandboxError(f"{what} the virtual machine {status}: {why}")


@contextlib.asynccontextmanager
async def monitor(sock: socket.socket, *, deadline: float = 20.0) -> AsyncIterator[Monitor]:
    """Connect to the QEMU at the other end of `sock`, and close it at the end. Raises SandboxError."""
    own = sock.dup()
    client = QMPClient("microvm")
    # Its log repeats the errors that are raised.
    client.logger.setLevel(logging.CRITICAL)
    try:
        async with asyncio.timeout(deadline):
            await client.connect(sock)
    except (TimeoutError, QMPError, OSError) as error:
        sock.close()
        own.close()
        raise SandboxError(f"QEMU's monitor does not answer: {error or 'timed out'}") from error
    try:
        yield Monitor(client, own, deadline)
    finally:
        own.close()
        with contextlib.suppress(QMPError, OSError, asyncio.IncompleteReadError):
            await client.disconnect()
