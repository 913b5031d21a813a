"""A frozen VM's memory, and the lease of a template: descriptors of memfds, and who still uses them.

Memory is a memfd for each block of the machine (`Machine.blocks`). When a VM is frozen, blocks that it never touched
are dropped, and the template's keeper fills the holes of the others: a private write to a hole of a shared file first
allocates the file's page and then the private copy, so that a clone would pay twice and the template would grow behind
its account. What is filled and sealed has its size for good (ADR 0031).

All methods block for a moment at most; descriptors are closed in the event loop that uses them.
"""

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Frozen:
    """What making a template brings: the memory's blocks by name, the state, and the scratch disk.

    Nothing maps the memory writable any more.
    """

    memory: dict[str, int]
    state: int
    scratch: Path

    def drop_untouched(self) -> int:
        """Close untouched blocks; return the bytes that the others take once filled, with the state."""
        for name, descriptor in [*self.memory.items()]:
            if os.fstat(descriptor).st_blocks == 0:
                os.close(self.memory.pop(name))
        memory = sum(os.fstat(descriptor).st_size for descriptor in self.memory.values())
        return memory + os.fstat(self.state).st_blocks * 512

    def close(self) -> None:
        """Close all descriptors."""
        for descriptor in (*self.memory.values(), self.state):
            os.close(descriptor)
        self.memory = {}


@dataclass(frozen=True)
class Account:
    """What one template takes. `instance` names it among all that were ever made, `size_mb` is its final size."""

    instance: str
    size_mb: int


@dataclass
class Template:
    """A template that this process holds a lease of. `memory` has the touched blocks only; all is sealed."""

    key: str
    account: Account
    memory: Mapping[str, int]
    state: int
    scratch: Path
    lease: socket.socket
    closed: bool = False
    _users: int = field(default=0)

    def is_kept(self) -> bool:
        """Say whether the keeper still keeps it; the descriptors are good in any case."""
        try:
            return self.lease.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the descriptors open for the time of a start, also when it is closed meanwhile."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self.closed and not self._users:
                self._close()

    def close(self) -> None:
        """Let go of it, now or when its last user has ended."""
        if not self.closed:
            self.closed = True
            if not self._users:
                self._close()

    def _close(self) -> None:
        self.lease.close()
        for descriptor in (*self.memory.values(), self.state):
            os.close(descriptor)
