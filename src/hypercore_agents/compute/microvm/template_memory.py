"""The memory of a template: the snapshot of a booted VM, and the lease by which a process clones from it.

Memory is a memfd for each block of the machine (`Machine.blocks`). A snapshot drops the blocks that its VM never
touched, and the template holder fills the holes of the others: a private write to a hole of a shared file first
allocates the file's page and then the private copy, so a clone would pay twice and the template would grow beyond its
counted size. Once filled and sealed, the size of a template is final (ADR 0031).

All methods block for a moment at most. Descriptors are closed in the event loop that uses them.
"""

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Snapshot:
    """The snapshot of a VM: the blocks of its memory by name, its state, and its scratch disk.

    The VM has ended, so no process has the memory mapped for writing.
    """

    memory: dict[str, int]
    state: int
    scratch: Path

    def drop_untouched(self) -> int:
        """Close untouched blocks; return the bytes that the others will take once filled, with the state."""
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
class TemplateInstance:
    """One created template. `name` is unique among all that were ever created, `size_mb` is its final size."""

    name: str
    size_mb: int


def total_mb(instances: Iterable[TemplateInstance]) -> int:
    """Return the memory of template instances together, counting each once."""
    return sum({instance.name: instance.size_mb for instance in instances}.values())


@dataclass
class Template:
    """A template that this process holds a lease of. `memory` has only touched blocks; all memory is sealed."""

    key: str
    instance: TemplateInstance
    memory: Mapping[str, int]
    state: int
    scratch: Path
    lease: socket.socket
    closed: bool = False
    _users: int = field(default=0)

    def has_holder(self) -> bool:
        """Return whether the template holder still runs. The descriptors are valid in any case."""
        try:
            return self.lease.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the descriptors open during a start, even if the template is closed in the meantime."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self.closed and not self._users:
                self._close()

    def close(self) -> None:
        """Release the lease, now or when the last start that uses the template has ended."""
        if not self.closed:
            self.closed = True
            if not self._users:
                self._close()

    def _close(self) -> None:
        self.lease.close()
        for descriptor in (*self.memory.values(), self.state):
            os.close(descriptor)
