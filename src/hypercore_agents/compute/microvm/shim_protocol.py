"""A shim's side of its conversation with the backend (`link` is the other side). Standard library only.

Over a SOCK_SEQPACKET socket (one JSON object per message):
    backend: the plan, with its descriptors · shim: {"process": pid} · backend: {"go": true} · shim: {"started": true}
    then   shim: {"guest": {...}} for every line of the VM · backend: {"tell": LINE} is passed to the VM
    at the end   backend: {"serve": true} (connections may come) and {"keep": true} · shim: {"kept": true}
    or at any point   shim: {"error": ...}
"""

from __future__ import annotations

import array
import contextlib
import json
import socket

# Importing `typing` would cost every shim half a megabyte; type checkers take this name for true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypedDict

    class Plan(TypedDict):
        """What to start.

        `arguments` are QEMU's, in which `{name}` stands for the number of the descriptor of that name: those that
        `descriptors` names, in the order in which they come with the plan, and `tap`, `control`, `console`, `log`. Of
        those, `listener` is the agent's listening socket. `gateway` is host and port, None for a VM of no one.
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
"""Largest message of the conversation, in bytes: what a local socket takes under the kernel's default limits."""

_MOST_DESCRIPTORS = 160
"""The blocks of a VM's memory (`machine`), and some files and sockets. One message of a local socket takes 253."""


class Gone(Exception):
    """The backend ended the conversation."""


class Conversation:
    """The backend's ear, as long as it is there."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.kept = False

    def plan(self) -> tuple[Plan, dict[str, int]]:
        """Return the plan and its descriptors by name."""
        room = socket.CMSG_SPACE(_MOST_DESCRIPTORS * array.array("i").itemsize)
        message, ancillary, _, _ = self.socket.recvmsg(MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        numbers = array.array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
        if not message:
            raise Gone
        plan: Plan = json.loads(message)
        return plan, dict(zip(plan["descriptors"], numbers, strict=True))

    def hear(self) -> dict[str, Any]:
        """Return the next message. Raises Gone."""
        message = self.socket.recv(MESSAGE_BYTES)
        if not message:
            raise Gone
        heard: dict[str, Any] = json.loads(message)
        return heard

    def say(self, **message: Any) -> None:
        """Tell the backend; it may be gone, and then nobody needs to know."""
        with contextlib.suppress(OSError):
            # Never waits: a backend that does not listen must not stop the VM's other work.
            self.socket.send(json.dumps(message).encode(), socket.MSG_DONTWAIT)
