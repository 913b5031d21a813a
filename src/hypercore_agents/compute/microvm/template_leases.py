"""Starts a template holder, and takes leases from it. All functions block; `template_holder` is the other side."""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.microvm import template_holder
from hypercore_agents.compute.microvm.machine import Machine
from hypercore_agents.compute.microvm.shim_client import spawn
from hypercore_agents.compute.microvm.template_folder import describe
from hypercore_agents.compute.microvm.template_memory import Snapshot, Template, TemplateInstance

_ANSWER_SECONDS = 20.0
_FILL_SECONDS = 120.0
"""Time for a holder to fill the holes of a template's memory: a busy host needs a second for each gigabyte."""


def lease(path: Path) -> Template | None:
    """Return a lease of the template in a folder, None if no holder answers there."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(_ANSWER_SECONDS)
    descriptors: list[int] = []
    try:
        with _socket_path(path) as address:
            connection.connect(address)
        message, descriptors = template_holder.receive_descriptors(connection, template_holder.MAX_DESCRIPTORS)
        value = json.loads(message)
        state, *blocks = descriptors
        memory = dict(zip(value["blocks"], blocks, strict=True))
        instance = TemplateInstance(value["instance"], value["size_mb"])
    except (OSError, ValueError, KeyError):
        connection.close()
        for descriptor in descriptors:
            os.close(descriptor)
        return None
    connection.settimeout(None)
    return Template(path.name, instance, memory, state, path / "scratch", connection)


def start_holder(
    path: Path,
    snapshot: Snapshot,
    instance: TemplateInstance,
    machine: Machine,
    *,
    groups: Sequence[str],
    linger: float,
) -> None:
    """Create a template's folder with the snapshot's disk, and start the holder of its memory.

    The holder ends `linger` seconds after its last lease. Raises SandboxError or OSError, and then the folder is gone.
    """
    path.mkdir(mode=0o700)
    try:
        snapshot.scratch.rename(path / "scratch")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            ours.settimeout(_FILL_SECONDS)
            with _socket_path(path) as address:
                listener.bind(address)
            listener.listen(64)
            holder = spawn(template_holder.PROGRAM, path.name, theirs.fileno())
            theirs.close()
            _hand_over(ours, listener, snapshot, instance, {"folder": str(path), "groups": groups, "linger": linger})
            describe(path, holder, instance, machine)
            _wait_until_ready(ours)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _hand_over(
    connection: socket.socket,
    listener: socket.socket,
    snapshot: Snapshot,
    instance: TemplateInstance,
    order: dict[str, object],
) -> None:
    order["lease"] = {"blocks": [*snapshot.memory], "instance": instance.name, "size_mb": instance.size_mb}
    descriptors = [listener.fileno(), snapshot.state, *snapshot.memory.values()]
    template_holder.send_descriptors(connection, json.dumps(order).encode(), descriptors)


def _wait_until_ready(connection: socket.socket) -> None:
    answer = connection.recv(1024)
    if answer != template_holder.READY:
        why = answer.decode(errors="replace") or "it exited at once"
        raise SandboxError(f"a template holder did not start: {why}")


@contextlib.contextmanager
def _socket_path(path: Path) -> Iterator[str]:
    """Give a short path of a template's socket: the path of a local socket has at most 107 bytes."""
    folder = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/socket"
    finally:
        os.close(folder)
