"""Which process a record means: pid, start time and boot id together, never a pid alone.

A pid is reused within minutes on a busy host and starts again at every boot, so a record that holds only a
pid may name a stranger. Signals therefore go through a pidfd that is opened first and checked second: once
the check has passed, the descriptor means that process and no other, however long it is held
(pidfd_open(2), pidfd_send_signal(2); Linux 5.3).

Rejected: `os.kill` after a check of the start time (the pid may change hands between the two).
"""

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
    """One process for all time. `started` is in clock ticks since the boot that `boot` names."""

    pid: int
    started: int
    boot: str

    def to_json(self) -> dict[str, object]:
        """Return the form that a record holds."""
        return {"pid": self.pid, "started": self.started, "boot": self.boot}

    @classmethod
    def from_json(cls, value: object) -> "ProcessIdentity | None":
        """Return the identity that a record holds, None for null. Raises ValueError for anything else."""
        match value:
            case None:
                return None
            case {"pid": int(pid), "started": int(started), "boot": str(boot)}:
                return cls(pid, started, boot)
        raise ValueError("a process must be an object with pid, started and boot")


@dataclass(frozen=True)
class ProcessStatus:
    """What `/proc/PID/stat` says that matters here (proc_pid_stat(5)): fields 3 and 22."""

    ended: bool
    started: int


@cache
def boot_id() -> str:
    """Return this boot's random id; it cannot change while this process lives."""
    return _BOOT_ID.read_text().strip()


def process_status(pid: int) -> ProcessStatus | None:
    """Return what the kernel says of a process, None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, field 2, may hold spaces and parentheses; it ends at the last one.
    fields = text.rpartition(")")[2].split()
    return ProcessStatus(ended=fields[0] in _ENDED, started=int(fields[19]))


def identify(pid: int) -> ProcessIdentity | None:
    """Return the identity of the process that has this pid now, None when there is none."""
    status = process_status(pid)
    return ProcessIdentity(pid, status.started, boot_id()) if status else None


def is_alive(identity: ProcessIdentity) -> bool:
    """Say whether the process still runs; one that ended and waits to be reaped does not."""
    if identity.boot != boot_id():
        return False
    status = process_status(identity.pid)
    return status is not None and not status.ended and status.started == identity.started


@contextmanager
def held(identity: ProcessIdentity | None) -> Iterator[int | None]:
    """Give a pidfd that means this process and no other, None when it no longer runs."""
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


def send(pidfd: int, number: signal.Signals) -> None:
    """Send a signal; a process that ended meanwhile needs none."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def wait_ended(pidfd: int, timeout: float) -> bool:
    """Block until the process ended, at most `timeout` seconds; say whether it did."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0, timeout) * 1000))


def reap(identity: ProcessIdentity | None) -> None:
    """Collect an ended child of this process; do nothing for a process that is not its child."""
    if identity is not None and identity.boot == boot_id():
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, identity.pid, os.WEXITED | os.WNOHANG)
