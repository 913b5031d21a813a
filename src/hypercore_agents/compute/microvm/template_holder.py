"""The process that holds a template's memory and state: sealed memfds, which exist while a process has them open.

The holder is a separate program, as the shim is: it uses the standard library only, and has its own user, an empty
root, no capabilities and few system calls (`helper_sandbox`). Its socket, to which only root can connect, hands out
copies of the descriptors. An open connection is a lease. After `linger` seconds without a lease the holder exits, which
frees the memory; the next process that lists templates removes the directory. Templates therefore survive a restart of
the manager, and no memory outlives the last manager for long.

Before the first lease, the holder joins the template's control group and fills the holes of the memory, so that the
group is charged with every page of the template. Then it seals the memory: no process, including the holder, can write
to it any more.

Rejected: files on a disk or in /dev/shm (every process that can open them can write to them, and they stay after a
crash); the manager as holder (ends at its restart); the template's shim (a template must not end with a VM).
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
"""The Python program; its arguments are the template's name and the folder that holds the package."""

CONTROL = 3
"""Descriptor of the socket to the process that started the holder."""

READY = b"ready"
"""The holder's answer once the template can be leased. Any other answer is an error."""

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

MAX_DESCRIPTORS = 160
"""The blocks of a template's memory (`machine`), its state and a socket. One message of a local socket takes 253."""

_MESSAGE_BYTES = 64 * 1024
_FIRST_LEASE_SECONDS = 30.0
_PAUSE_SECONDS = 0.2


def send_descriptors(sock: socket.socket, message: bytes, descriptors: list[int]) -> None:
    """Send a message with descriptors over a local socket."""
    sock.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])


def receive_descriptors(sock: socket.socket, limit: int) -> tuple[bytes, list[int]]:
    """Receive a message and at most `limit` descriptors; b"" if the peer has closed the socket."""
    size = socket.CMSG_SPACE(limit * array.array("i").itemsize)
    message, ancillary, _, _ = sock.recvmsg(_MESSAGE_BYTES, size, socket.MSG_CMSG_CLOEXEC)
    numbers = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    return message, [*numbers]


def fill_and_seal(descriptors: list[int]) -> None:
    """Allocate every page of the memfds, charged to this process's control group, and seal them. Raises OSError."""
    for descriptor in descriptors:
        if size := os.fstat(descriptor).st_size:
            os.posix_fallocate(descriptor, 0, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)


def serve_leases(listener: socket.socket, message: bytes, descriptors: list[int], linger: float) -> None:
    """Send every client the descriptors and their description; return after `linger` seconds without a lease."""
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
                    # This process or the host has no descriptors left. The client waits; existing leases go on.
                    time.sleep(_PAUSE_SECONDS)
                    continue
                with contextlib.suppress(OSError):
                    send_descriptors(lease, message, descriptors)
                leases[lease.fileno()] = lease
                poll.register(lease, select.POLLIN)
            else:
                # Clients send nothing, so any event on a lease ends it.
                poll.unregister(descriptor)
                leases.pop(descriptor).close()
                deadline = time.monotonic() + linger


def main() -> None:
    """Run the holder of one template."""
    os.chdir("/")
    close_above(CONTROL)
    os.set_inheritable(CONTROL, False)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    # When the host runs out of memory, the kernel should kill a template before the manager.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("300")
    control = socket.socket(fileno=CONTROL)
    message, descriptors = receive_descriptors(control, MAX_DESCRIPTORS)
    order = json.loads(message)
    listener = socket.socket(fileno=descriptors.pop(0))
    try:
        confinement.join_groups(order["groups"])
        fill_and_seal(descriptors)
    except OSError as error:
        control.send(f"its memory cannot be filled: {error}".encode())
        sys.exit(1)
    helper_sandbox.enter(order["folder"], helper_sandbox.HOLDER_UID)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    helper_sandbox.filter_system_calls()
    control.send(READY)
    control.close()
    serve_leases(listener, json.dumps(order["lease"]).encode(), descriptors, order["linger"])
