"""The backend's side of the protocol with a shim (`shim_protocol`).

Closing the connection before `detach` ends the VM. That undoes a start that fails, is cancelled, or whose manager dies.
"""

import array
import asyncio
import json
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.host.identity import ProcessIdentity, identify
from hypercore_agents.compute.host.spawning import PACKAGE_FOLDER, spawn_detached
from hypercore_agents.compute.microvm import shim
from hypercore_agents.compute.microvm.shim_protocol import MESSAGE_BYTES

if TYPE_CHECKING:
    from hypercore_agents.compute.microvm.shim_protocol import Plan

_ANSWER_SECONDS = 30.0


class ShimConnection:
    """The connection to a shim that this process started, for the time of a start. Use it in one task."""

    def __init__(self, name: str) -> None:
        """Start the shim. Raises SandboxError or OSError."""
        self._name = name
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        with theirs:
            try:
                self.identity = spawn(shim.PROGRAM, name, theirs.fileno())
            except BaseException:
                self._socket.close()
                raise
        self._guest: list[dict[str, Any]] = []

    async def prepare(self, plan: "Plan", descriptors: Mapping[str, int]) -> tuple[ProcessIdentity, Mapping[str, int]]:
        """Send the plan; return the child that will become QEMU, and the numbers of its descriptors.

        Raises SandboxError.
        """
        numbers = array.array("i", descriptors.values())
        message = json.dumps({**plan, "descriptors": [*descriptors]}).encode()
        self._socket.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
        match await self._answer("process"):
            case {"process": int(pid), "numbers": dict(given)}:
                identity = identify(pid)
                if identity is not None:
                    return identity, given
        raise SandboxError(f"cannot start {self._name}: its shim did not report the process that it started")

    async def go(self) -> None:
        """Let the child become QEMU. Raises SandboxError."""
        self._send(go=True)
        await self._answer("started")

    async def receive_from_guest(self, name: str, seconds: float) -> Any:
        """Return the VM's message of this name. Raises SandboxError if the VM ends, TimeoutError after `seconds`."""
        async with asyncio.timeout(seconds):
            while True:
                while self._guest:
                    message = self._guest.pop(0)
                    if name in message:
                        return message[name]
                self._guest.append((await self._receive("guest"))["guest"])

    def send_to_guest(self, line: bytes) -> None:
        """Send a line to the VM. Raises SandboxError."""
        self._send(tell=line.decode())

    async def detach(self) -> None:
        """Accept connections to the agent, and let the VM run on without this process. Raises SandboxError."""
        self._send(serve=True)
        self._send(keep=True)
        await self._answer("kept")

    def close(self) -> None:
        """Close the connection. Without an earlier `detach` the VM ends."""
        self._socket.close()

    async def _answer(self, name: str) -> dict[str, Any]:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await self._receive(name)
        except TimeoutError:
            raise SandboxError(f"cannot start {self._name}: its shim does not answer") from None

    async def _receive(self, name: str) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        while True:
            try:
                message = await loop.sock_recv(self._socket, MESSAGE_BYTES)
            except OSError as error:
                raise SandboxError(f"cannot start {self._name}: its shim is gone ({error.strerror})") from error
            received: dict[str, Any] = json.loads(message) if message else {"error": "its shim ended"}
            if "error" in received:
                raise SandboxError(f"cannot start {self._name}: {received['error']}")
            if name in received:
                return received
            if "guest" in received:
                self._guest.append(received["guest"])

    def _send(self, **message: Any) -> None:
        try:
            self._socket.send(json.dumps(message).encode())
        except OSError as error:
            raise SandboxError(f"cannot start {self._name}: its shim is gone ({error.strerror})") from error


def spawn(program: str, name: str, descriptor: int) -> ProcessIdentity:
    """Start a Python program in a process that outlives this one; `descriptor` becomes its descriptor 3.

    The program's arguments are `name` and the folder that holds this package. Raises SandboxError or OSError.
    """
    arguments = [sys.executable, "-I", "-S", "-c", program, name, PACKAGE_FOLDER]
    return spawn_detached(arguments, {descriptor: shim.CONTROL}, {}, name)
