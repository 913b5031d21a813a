"""The backend's side of the conversation with a shim (`conversation` has the protocol).

Closing a link before `keep` ends the VM: that is how a start that fails, is cancelled or whose manager dies is undone.
"""

import array
import asyncio
import json
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.host.identity import ProcessIdentity, held, identify, reap
from hypercore_agents.compute.host.spawning import PACKAGE_FOLDER, spawn_detached
from hypercore_agents.compute.microvm import shim
from hypercore_agents.compute.microvm.shim_protocol import MESSAGE_BYTES

if TYPE_CHECKING:
    from hypercore_agents.compute.microvm.shim_protocol import Plan

_ANSWER_SECONDS = 30.0


class ShimLink:
    """A shim that this process started, as long as the start goes on. Use it in one task."""

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
        """Hand over the plan; return the child that will become QEMU, and its descriptors' numbers. SandboxError."""
        numbers = array.array("i", descriptors.values())
        told = json.dumps({**plan, "descriptors": [*descriptors]}).encode()
        self._socket.sendmsg([told], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
        match await self._answer("process"):
            case {"process": int(pid), "numbers": dict(given)}:
                identity = identify(pid)
                if identity is not None:
                    return identity, given
        raise SandboxError(f"cannot start {self._name}: its shim did not say which process it started")

    async def go(self) -> None:
        """Let the child become QEMU. Raises SandboxError."""
        self._say(go=True)
        await self._answer("started")

    async def hear_guest(self, name: str, seconds: float) -> Any:
        """Return what the VM says under this name. Raises SandboxError when it ends, TimeoutError when it is silent."""
        async with asyncio.timeout(seconds):
            while True:
                while self._guest:
                    message = self._guest.pop(0)
                    if name in message:
                        return message[name]
                self._guest.append((await self._hear("guest"))["guest"])

    def tell_guest(self, line: bytes) -> None:
        """Send a line to the VM."""
        self._say(tell=line.decode())

    async def keep(self) -> None:
        """Let connections in, and let the VM live on without us. Raises SandboxError."""
        self._say(serve=True)
        self._say(keep=True)
        await self._answer("kept")

    def close(self) -> None:
        """End the conversation; without `keep`, the VM ends too."""
        self._socket.close()

    async def _answer(self, name: str) -> dict[str, Any]:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await self._hear(name)
        except TimeoutError:
            raise SandboxError(f"cannot start {self._name}: its shim is silent") from None

    async def _hear(self, name: str) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        while True:
            try:
                message = await loop.sock_recv(self._socket, MESSAGE_BYTES)
            except OSError as error:
                raise SandboxError(f"cannot start {self._name}: its shim is gone ({error.strerror})") from error
            heard: dict[str, Any] = json.loads(message) if message else {"error": "its shim ended"}
            if "error" in heard:
                raise SandboxError(f"cannot start {self._name}: {heard['error']}")
            if name in heard:
                return heard
            if "guest" in heard:
                self._guest.append(heard["guest"])

    def _say(self, **message: Any) -> None:
        try:
            self._socket.send(json.dumps(message).encode())
        except OSError as error:
            raise SandboxError(f"cannot start {self._name}: its shim is gone ({error.strerror})") from error


def spawn(program: str, name: str, descriptor: int) -> ProcessIdentity:
    """Start a program of ours in a process that outlives this one; `descriptor` becomes its third. Raises SandboxError.

    It is told its name and where this package is.
    """
    arguments = [sys.executable, "-I", "-S", "-c", program, name, PACKAGE_FOLDER]
    return spawn_detached(arguments, {descriptor: shim.CONVERSATION}, {}, name)


async def ended(identity: ProcessIdentity, seconds: float) -> bool:
    """Wait until a process has ended, at most so long; say whether it did. A child of this process is collected."""
    with held(identity) as pidfd:
        if pidfd is not None:
            loop = asyncio.get_running_loop()
            gone = asyncio.Event()
            loop.add_reader(pidfd, gone.set)
            try:
                async with asyncio.timeout(seconds):
                    await gone.wait()
            except TimeoutError:
                return False
            finally:
                loop.remove_reader(pidfd)
    reap(identity)
    return True
