"""The process that holds a template's memory and state: sealed memfds, which exist as long as somebody has them open.

A program of its own, like the shim, with the standard library only, and with a user of its own, an empty root, no
capability and few system calls (`seclusion`). It hands copies of the descriptors to whoever connects to its socket,
which only root can. A connection that stays open is a lease: without any for `linger` seconds the template is nobody's,
and the keeper ends, which frees the memory. Its directory is removed by whoever looks at templates next. So templates
survive a manager's restart, and no memory outlives the last manager for long.

Before the first lease, the keeper joins the template's control group, fills the holes of the memory, so that the group
is charged with every page of the template, and seals it: nobody, the keeper included, can write to it any more.

Rejected: files on a disk or in /dev/shm (whoever may open them may write; they stay after a crash); the manager as
holder (gone with its restart); the template's shim (one VM's end must not be a template's).
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import sys
import time

from hypercore_agents.compute.host.shims import close_above
from hypercore_agents.compute.microvm import confinement, helper_sandbox

PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[2]); "
    "from hypercore_agents.compute.microvm.template_holder import main; main()"
)
"""What Python runs; its arguments are the template's name and the folder that holds the package."""

CONVERSATION = 3
"""Descriptor of the conversation with whoever started the keeper."""

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

MOST_DESCRIPTORS = 160
"""The blocks of a template's memory (`machine`), its state and a socket. One message of a local socket takes 253."""

_MESSAGE_BYTES = 64 * 1024
_FIRST_LEASE_SECONDS = 30.0
_REST_SECONDS = 0.2


def send_descriptors(sock: socket.socket, message: bytes, descriptors: list[int]) -> None:
    """Send a message with descriptors over a local socket."""
    sock.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])


def receive_descriptors(sock: socket.socket, most: int) -> tuple[bytes, list[int]]:
    """Receive a message and its descriptors; b"" when the other side has gone."""
    room = socket.CMSG_SPACE(most * array.array("i").itemsize)
    message, ancillary, _, _ = sock.recvmsg(_MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    numbers = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    return message, [*numbers]


def fill_and_seal(descriptors: list[int]) -> None:
    """Allocate every page of the memfds, which are charged to this process's group, and seal them. Raises OSError."""
    for descriptor in descriptors:
        if size := os.fstat(descriptor).st_size:
            os.posix_fallocate(descriptor, 0, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)


def keep(listener: socket.socket, message: bytes, descriptors: list[int], linger: float) -> None:
    """Hand out the descriptors, with a message that describes them, until nobody wants them for `linger` seconds."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    leases: dict[int, socket.socket] = {}
    deadline = time.monotonic() + max(linger, _FIRST_LEASE_SECONDS)
    while leases or time.monotonic() < deadline:
        events = poll.poll(None if leases else max(0, deadline - time.monotonic()) * 1000)
        for descriptor, _ in events:
            if descriptor == listener.fileno():
                try:
                    lease, _ = listener.accept()
                except OSError:
                    # Descriptors have run out, here or on the host: whoever waits goes on waiting, not the template.
                    time.sleep(_REST_SECONDS)
                    continue
                with contextlib.suppress(OSError):
                    send_descriptors(lease, message, descriptors)
                leases[lease.fileno()] = lease
                poll.register(lease, select.POLLIN)
            else:
                # Whatever a holder says, it is its last word.
                poll.unregister(descriptor)
                leases.pop(descriptor).close()
                deadline = time.monotonic() + linger


def main() -> None:
    """Be the keeper of one template."""
    os.chdir("/")
    close_above(CONVERSATION)
    os.set_inheritable(CONVERSATION, False)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    # Templates are what the host can do without first.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("300")
    conversation = socket.socket(fileno=CONVERSATION)
    message, descriptors = receive_descriptors(conversation, MOST_DESCRIPTORS)
    order = json.loads(message)
    listener = socket.socket(fileno=descriptors.pop(0))
    try:
        confinement.join_groups(order["groups"])
        fill_and_seal(descriptors)
    except OSError as error:
        conversation.send(f"its memory cannot be filled: {error}".encode())
        sys.exit(1)
    helper_sandbox.shut_in(order["folder"], helper_sandbox.KEEPER_UID)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    helper_sandbox.restrict()
    conversation.send(b"kept")
    conversation.close()
    keep(listener, json.dumps(order["lease"]).encode(), descriptors, order["linger"])
