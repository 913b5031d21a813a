"""Disk reservations of session images: keeps their sum, over all agents of a host, within the host's free space.

Images are sparse: a limit takes no space until the session writes. So that no write finds the host's disk full, the
reserved space that is not yet on the disk must fit into what is free there:

    sum over agents(reserved - on the disk) <= free - kept for the host

Each agent writes its sum into one small file beside its images and reads those of the others, all under one lock. The
kernel counts what is on the disk and what is free. An agent's file is deleted with the agent's folder, so nothing has
to be released after a crash.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager, suppress

from hypercore_agents.agent.launcher.storage import InsufficientDisk
from hypercore_agents.kit.linux.disk_reservations import PROMISED, free_and_reserved, on_disk, outstanding_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class DiskReservations:
    """The reservations of one agent, by session. `folder` holds its images.

    `siblings` is the folder of all agents of this host; each has its images there at the same relative path as this
    one. None: this agent is the only one.
    """

    def __init__(self, folder: str, siblings: str | None) -> None:
        self._folder = folder
        self._siblings = os.path.realpath(siblings) if siblings else None
        self._below_agent = ""
        if self._siblings is not None:
            relative = os.path.relpath(folder, self._siblings)
            if relative.startswith(".."):
                raise OSError(f"{folder} is not below {siblings}")
            self._below_agent = relative.partition("/")[2]
        self._file = os.open(os.path.join(folder, PROMISED), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._write(0)
        self._sizes: dict[str, int] = {}

    def set(self, session: str, size: int) -> None:
        """Reserve `size` bytes in all for a session; 0 releases it. Raises InsufficientDisk and changes nothing."""
        before = self._sizes.get(session, 0)
        with self._locked():
            total = sum(self._sizes.values()) - before + size
            if size > before:
                self._admit(total, size)
            self._write(total)
        self._sizes[session] = size
        if not size:
            del self._sizes[session]

    def _admit(self, total: int, requested: int) -> None:
        free, for_host = free_and_reserved(self._folder)
        outstanding = max(0, total - on_disk(self._folder))
        for folder in self._other_agents():
            with suppress(OSError, ValueError):
                outstanding += outstanding_in(folder)
        if outstanding > free - for_host:
            for_others = (outstanding - requested) >> 20
            raise InsufficientDisk(
                f"the host's disk cannot hold another session of {requested >> 20} MB: of {free >> 20} MB free, "
                f"{max(0, for_others)} MB are reserved for other sessions and {for_host >> 20} MB for the host; end "
                "sessions, free disk space or set a smaller SESSION_DISK_MB"
            )

    def _other_agents(self) -> Iterator[str]:
        if self._siblings is None:
            return
        for name in os.listdir(self._siblings):
            folder = os.path.join(self._siblings, name, self._below_agent)
            if folder != self._folder:
                yield folder

    def _write(self, total: int) -> None:
        # In place, with a fixed width: readers hold the lock, and a rename would wait for the disk.
        os.pwrite(self._file, b"%020d" % total, 0)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = os.open(self._siblings or self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
