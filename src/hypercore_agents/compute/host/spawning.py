"""Starting a program that outlives whoever starts it, and the socket on which its agent will be found."""

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
"""Where a program of ours that runs apart finds this package."""

_BACKLOG = 1024


def spawn_apart(
    arguments: list[str], descriptors: Mapping[int, int], environment: Mapping[str, str], name: str
) -> ProcessIdentity:
    """Start a program in a session of its own, silent; `descriptors` maps ours to its. Raises SandboxError or OSError.

    Not `subprocess`: what it starts must be waited for by the object that started it, and this child outlives us;
    whoever stops the sandbox reaps it.
    """
    with _out_of_the_way(descriptors) as moved:
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
    # Our child, which nobody reaps but us: the pid is its own, even if it has ended.
    identity = identify(pid)
    if identity is None:
        raise SandboxError(f"cannot start {name}: its shim is gone")
    return identity


@contextlib.contextmanager
def agents_listener() -> Iterator[socket.socket]:
    """Give a socket that listens on a loopback port of its own."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(_BACKLOG)
        yield listener


@contextlib.contextmanager
def _out_of_the_way(descriptors: Mapping[int, int]) -> Iterator[dict[int, int]]:
    """Give copies whose numbers are none of those that the child gets."""
    above = max(descriptors.values(), default=2) + 1
    with contextlib.ExitStack() as stack:
        moved = {}
        for ours, theirs in descriptors.items():
            copy = fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, above)
            stack.callback(os.close, copy)
            moved[copy] = theirs
        yield moved
