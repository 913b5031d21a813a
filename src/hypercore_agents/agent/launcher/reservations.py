"""The sum of what images may grow to, held against what the host's disk has free; for all agents of a host.

Images are sparse: a limit is a promise that takes nothing until it is used. So that no session's write ever finds the
host full, the part of all promises that is not on the disk yet must fit into what is free there:

    sum over agents(promised - on the disk) <= free - reserve

Each agent writes its sum into one small file beside its images, and reads the others'. All of them do that under one
lock. What is on the disk, and what is free, is the kernel's own count; an agent's file goes with the agent's folder, so
nothing has to be given back after a crash.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager, suppress

from hypercore_agents.agent.launcher.storage import NoDisk
from hypercore_agents.kit.linux.disk_reservations import PROMISED, free_and_reserved, on_disk, outstanding_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class DiskReservations:
    """The promises of one agent, by session. `folder` holds its images.

    `siblings` is the folder in which the agents of this host have theirs; the images of each lie there at the same
    place as this one's. None: this agent is the only one.
    """

    def __init__(self, folder: str, siblings: str | None) -> None:
        self._folder = folder
        self._siblings = os.path.realpath(siblings) if siblings else None
        self._below = ""
        if self._siblings is not None:
            own = os.path.relpath(folder, self._siblings)
            if own.startswith(".."):
                raise OSError(f"{folder} is not below {siblings}")
            self._below = own.partition("/")[2]
        self._file = os.open(os.path.join(folder, PROMISED), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._write(0)
        self._promised: dict[str, int] = {}

    def change(self, session: str, promised: int) -> None:
        """Promise a session so many bytes in all, 0 for one that is gone. Raises NoDisk, and nothing has changed."""
        before = self._promised.get(session, 0)
        with self._alone():
            own = sum(self._promised.values()) - before + promised
            if promised > before:
                self._admit(own, promised)
            self._write(own)
        self._promised[session] = promised
        if not promised:
            del self._promised[session]

    def _admit(self, own: int, asked: int) -> None:
        free, reserve = free_and_reserved(self._folder)
        outstanding = max(0, own - on_disk(self._folder))
        for folder in self._others():
            with suppress(OSError, ValueError):
                outstanding += outstanding_in(folder)
        if outstanding > free - reserve:
            others = (outstanding - asked) >> 20
            raise NoDisk(
                f"the host's disk cannot hold another session's {asked >> 20} MB: of {free >> 20} MB that are free, "
                f"{max(0, others)} MB are promised to other sessions and {reserve >> 20} MB are kept for the host; end "
                "sessions, free some disk, or set a smaller SESSION_DISK_MB"
            )

    def _others(self) -> Iterator[str]:
        if self._siblings is None:
            return
        for name in os.listdir(self._siblings):
            folder = os.path.join(self._siblings, name, self._below)
            if folder != self._folder:
                yield folder

    def _write(self, own: int) -> None:
        # In place, at one width: whoever reads it holds the lock, and a rename would wait for the disk.
        os.pwrite(self._file, b"%020d" % own, 0)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = os.open(self._siblings or self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
