"""Starts a program that outlives the manager, and opens the socket on which its agent listens."""

import contextlib
import fcntl
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import hypercore_agents
from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.host.identity import ProcessIdentity, identify

PACKAGE_FOLDER = str(Path(hypercore_agents.__file__).parent.parent)
"""The folder from which a detached program imports this package."""

_BACKLOG = 1024


def spawn_detached(
    arguments: list[str], descriptors: Mapping[int, int], environment: Mapping[str, str], name: str
) -> ProcessIdentity:
    """Start a program in its own session, without output; `descriptors` maps this process's numbers to the program's.

    Raises SandboxError or OSError. Not by `subprocess`, whose object must wait for its child: this child outlives the
    manager, and is reaped when its sandbox is stopped.
    """
    with _moved_up(descriptors) as moved:
        pid = os.posix_spawn(
            arguments[0],
            arguments,
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                *((os.POSIX_SPAWN_DUP2, ours, theirs) for ours, theirs in moved.items()),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD),
        )
    # Only this process reaps the child, so the pid is still the child's, even if it has ended.
    identity = identify(pid)
    if identity is None:
        raise SandboxError(f"cannot start {name}: its shim is gone")
    return identity


@contextlib.contextmanager
def open_listener() -> Iterator[socket.socket]:
    """Give a socket that listens on a free loopback port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(_BACKLOG)
        yield listener


@contextlib.contextmanager
def _moved_up(descriptors: Mapping[int, int]) -> Iterator[dict[int, int]]:
    """Give copies of the descriptors whose numbers differ from all numbers that the child gets."""
    above = max(descriptors.values(), default=2) + 1
    with contextlib.ExitStack() as stack:
        moved = {}
        for ours, theirs in descriptors.items():
            copy = fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, above)
            stack.callback(os.close, copy)
            moved[copy] = theirs
        yield moved
