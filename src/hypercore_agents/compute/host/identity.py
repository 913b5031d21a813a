"""Identifies a process across pid reuse and reboots, by pid, start time and boot id together.

A busy host reuses a pid within minutes, and pids start again at every boot, so a record with only a pid may name an
unrelated process. Signals therefore go through a pidfd that is opened first and checked second: after the check, the
descriptor refers to that process for as long as it is open (pidfd_open(2), pidfd_send_signal(2); Linux 5.3).

Rejected: `os.kill` after a check of the start time (the pid may be reused between the two).
"""

import asyncio
import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ENDED = frozenset("ZXx")


@dataclass(frozen=True)
class ProcessIdentity:
    """One process, unique over all boots. `started` is in clock ticks since the boot with the id `boot`."""

    pid: int
    started: int
    boot: str

    def to_json(self) -> dict[str, object]:
        """Return the JSON value for a record."""
        return {"pid": self.pid, "started": self.started, "boot": self.boot}

    @classmethod
    def from_json(cls, value: object) -> "ProcessIdentity | None":
        """Return the identity in a JSON value, None for null. Raises ValueError for any other value."""
        match value:
            case None:
                return None
            case {"pid": int(pid), "started": int(started), "boot": str(boot)}:
                return cls(pid, started, boot)
        raise ValueError("a process must be an object with pid, started and boot")


@dataclass(frozen=True)
class ProcessStatus:
    """Fields 3 and 22 of `/proc/PID/stat` (proc_pid_stat(5)): whether the process has ended, and its start time."""

    ended: bool
    started: int


@cache
def boot_id() -> str:
    """Return the random id of this boot, which cannot change while this process runs."""
    return _BOOT_ID.read_text().strip()


def process_status(pid: int) -> ProcessStatus | None:
    """Return the status of a process, None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name (field 2) may contain spaces and parentheses; it ends at the last closing parenthesis.
    fields = text.rpartition(")")[2].split()
    return ProcessStatus(ended=fields[0] in _ENDED, started=int(fields[19]))


def identify(pid: int) -> ProcessIdentity | None:
    """Return the identity of the process that has this pid now, None if there is none."""
    status = process_status(pid)
    return ProcessIdentity(pid, status.started, boot_id()) if status else None


def is_alive(identity: ProcessIdentity) -> bool:
    """Return whether the process still runs. A zombie does not."""
    if identity.boot != boot_id():
        return False
    status = process_status(identity.pid)
    return status is not None and not status.ended and status.started == identity.started


@contextmanager
def pidfd_of(identity: ProcessIdentity | None) -> Iterator[int | None]:
    """Give a pidfd of exactly this process, None if it no longer runs."""
    if identity is None or not is_alive(identity):
        yield None
        return
    try:
        pidfd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield pidfd if is_alive(identity) else None
    finally:
        os.close(pidfd)


def send_signal(pidfd: int, number: signal.Signals) -> None:
    """Send a signal; do nothing if the process has ended in the meantime."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def wait_for_end(pidfd: int, timeout: float) -> bool:
    """Block until the process has ended, at most `timeout` seconds; return whether it has."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0, timeout) * 1000))


async def wait_until_ended(identity: ProcessIdentity, seconds: float) -> bool:
    """Wait until a process has ended, at most `seconds`; return whether it has. A child of this process is reaped."""
    with pidfd_of(identity) as pidfd:
        if pidfd is not None:
            loop = asyncio.get_running_loop()
            gone = asyncio.Event()
            loop.add_reader(pidfd, gone.set)
            try:
                async with asyncio.timeout(seconds):
                    await gone.wait()
            except TimeoutError:
                return False
            finally:
                loop.remove_reader(pidfd)
    reap(identity)
    return True


def reap(identity: ProcessIdentity | None) -> None:
    """Reap an ended child of this process; do nothing for other processes."""
    if identity is not None and identity.boot == boot_id():
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, identity.pid, os.WEXITED | os.WNOHANG)
