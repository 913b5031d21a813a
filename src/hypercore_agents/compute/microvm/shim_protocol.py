"""The protocol between a shim and the backend, and the shim's side of it; `shim_client` has the backend's side.

Uses the standard library only.

Over a SOCK_SEQPACKET socket (one JSON object per message):
    backend: the plan, with its descriptors · shim: {"process": pid} · backend: {"go": true} · shim: {"started": true}
    then             shim: {"guest": {...}} for every line of the VM · backend: {"tell": LINE}, passed on to the VM
    at the end       backend: {"serve": true} (accept connections) and {"keep": true} (detach) · shim: {"kept": true}
    or at any point  shim: {"error": ...}
"""

from __future__ import annotations

import array
import contextlib
import json
import socket

# Importing `typing` would cost every shim half a megabyte; type checkers treat this name as true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypedDict

    class Plan(TypedDict):
        """The VM to start.

        `arguments` is QEMU's command line, in which `{name}` stands for the number of a descriptor: those in
        `descriptors`, in the order in which they arrive with the plan, and `tap`, `control`, `console` and `log`. The
        descriptor `listener` is the agent's listening socket. `place` is a directory to mount on. `gateway` is host
        and port, None for the VM of a template.
        """

        arguments: list[str]
        descriptors: list[str]
        place: str
        uid: int
        kvm: bool
        cgroups: list[str]
        gateway: list[Any] | None
        exit: str
        log: str
        console: str
        log_bytes: int


MESSAGE_BYTES = 128 * 1024
"""Largest message, in bytes: the limit of a local socket under the kernel's default settings."""

_MAX_DESCRIPTORS = 160
"""The blocks of a VM's memory (`machine`), and a few files and sockets. One message of a local socket takes 253."""


class BackendGone(Exception):
    """The backend has closed the connection."""


class BackendConnection:
    """The connection to the backend. `detached`: the VM runs on when the connection closes."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.detached = False

    def receive_plan(self) -> tuple[Plan, dict[str, int]]:
        """Return the plan and its descriptors by name. Raises BackendGone."""
        size = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
        message, ancillary, _, _ = self.socket.recvmsg(MESSAGE_BYTES, size, socket.MSG_CMSG_CLOEXEC)
        numbers = array.array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
        if not message:
            raise BackendGone
        plan: Plan = json.loads(message)
        return plan, dict(zip(plan["descriptors"], numbers, strict=True))

    def receive(self) -> dict[str, Any]:
        """Return the next message. Raises BackendGone."""
        message = self.socket.recv(MESSAGE_BYTES)
        if not message:
            raise BackendGone
        received: dict[str, Any] = json.loads(message)
        return received

    def send(self, **message: Any) -> None:
        """Send a message; do nothing if the backend is gone."""
        with contextlib.suppress(OSError):
            # Never blocks: a backend that does not read must not stop the forwarding of connections.
            self.socket.send(json.dumps(message).encode(), socket.MSG_DONTWAIT)
