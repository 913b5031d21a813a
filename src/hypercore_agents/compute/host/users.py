"""Assigns a separate user to every agent, where the manager has the rights for it.

A uid belongs to one sandbox of the whole host, also if several managers with several state directories run on it. A
claim is a file whose name is the uid and whose content is the sandbox's directory. Claims survive reboots, as the files
of sandboxes do. A claim whose directory is gone is free again once no process has the uid.

The default range is in the part of the uid space that systemd leaves unused (`UIDS-GIDS`: 1879048192 to 2147483647),
far from people, packages, dynamic users (61184 to 65519) and containers.

Rejected: uids counted per state directory (two managers would share them); accounts by `useradd` (entries in a file of
the host that would have to be removed again, for users who never log in).
"""

import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hypercore_agents.compute.base import InsufficientResources
from hypercore_agents.compute.host.identity import process_status

AGENT_UIDS = range(1_900_000_000, 1_900_010_000)
"""Users (and groups of the same numbers) that agents run as."""

_SESSIONS = range(1_910_000_000, 2_110_000_000)
_SESSIONS_PER_AGENT = 20_000

CLAIMS = Path("/var/lib/hypercore-agents/uids")
"""The folder of claims, one per host."""

# capabilities(7): CHOWN, DAC_OVERRIDE, KILL, SETGID, SETUID
_NEEDED_CAPABILITIES = 1 << 0 | 1 << 1 | 1 << 5 | 1 << 6 | 1 << 7

_MOST_LINKS = 40
"""The number of links that the kernel follows in one path (path_resolution(7))."""


def session_uids(uid: int) -> range | None:
    """Return the users for sessions of the agent with this uid, disjoint from other agents'; None outside the range."""
    if uid not in AGENT_UIDS:
        return None
    first = _SESSIONS.start + AGENT_UIDS.index(uid) * _SESSIONS_PER_AGENT
    return range(first, first + _SESSIONS_PER_AGENT)


class AgentUsers:
    """Assigns uids of a range, each to one sandbox at a time. All methods block."""

    def __init__(self, uids: range, claims: Path) -> None:
        self._uids = uids
        self._claims = claims

    def claim(self, sandbox: Path) -> int:
        """Return a uid for a sandbox, until `release`. Raises InsufficientResources if none is free, and OSError."""
        with self._locked():
            # Starts at a random position, so that a released uid is not reused at once.
            first = secrets.randbelow(len(self._uids))
            for offset in range(len(self._uids)):
                uid = self._uids[(first + offset) % len(self._uids)]
                if self._is_free(uid):
                    self._write(uid, sandbox)
                    return uid
        raise InsufficientResources(
            f"agents use all {len(self._uids)} users from {self._uids.start}; stop some agents, or widen the range"
        )

    def release(self, uid: int, sandbox: Path) -> None:
        """Release the uid if it belongs to this sandbox. Its processes and files must be gone."""
        with self._locked():
            if self._owner(uid) == sandbox:
                (self._claims / str(uid)).unlink()

    def release_unrecorded(self, sandbox: Path) -> None:
        """Release the uid of a sandbox whose record does not name one."""
        with self._locked():
            for claim in self._claims.iterdir():
                if claim.name.isdigit() and self._owner(int(claim.name)) == sandbox:
                    claim.unlink()

    def _write(self, uid: int, sandbox: Path) -> None:
        claim = self._claims / str(uid)
        try:
            claim.write_text(str(sandbox))
        except OSError:
            claim.unlink(missing_ok=True)
            raise

    def _is_free(self, uid: int) -> bool:
        owner = self._owner(uid)
        return owner is None or (not owner.exists() and not any(processes_of(uid)))

    def _owner(self, uid: int) -> Path | None:
        try:
            return Path((self._claims / str(uid)).read_text())
        except FileNotFoundError:
            return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._claims.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._claims, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def processes_of(uid: int) -> Iterator[int]:
    """Yield the pids of processes with this real or effective user, or with a user of its sessions."""
    sessions = session_uids(uid) or ()
    for name in os.listdir("/proc"):
        if name.isdigit() and any(user == uid or user in sessions for user in _users_of(name)):
            status = process_status(int(name))
            if status and not status.ended:
                yield int(name)


def _users_of(pid: str) -> tuple[int, ...]:
    # Not by the owner of /proc/PID, which is root for a process that may not be traced.
    try:
        with open(f"/proc/{pid}/status", errors="replace") as file:
            for line in file:
                if line.startswith("Uid:"):
                    return tuple(int(uid) for uid in line.split()[1:3])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return ()


def why_no_session_users(uids: range) -> str | None:
    """Return why sessions cannot have separate users, to follow "because"; None if they can."""
    if uids != AGENT_UIDS:
        return f"the agents' users are not the {len(AGENT_UIDS)} from {AGENT_UIDS.start}, which have users for sessions"
    return None if _is_mapped(_SESSIONS) else f"users from {_SESSIONS.start} do not exist in this user namespace"


def why_no_separate_users(uids: range | None, claims: Path, reached: Iterable[Path]) -> str | None:
    """Return why agents cannot have separate users, to follow "because"; None if they can.

    `reached` are the paths that an agent's user must be able to reach.
    """
    if uids is None:
        return "separate users are switched off"
    if os.geteuid() != 0 or _effective_capabilities() & _NEEDED_CAPABILITIES != _NEEDED_CAPABILITIES:
        return "the manager is not root"
    if not _is_mapped(uids):
        return f"users from {uids.start} do not exist in this user namespace"
    for path in reached:
        closed = closed_component(path)
        if closed:
            return f"{closed} is closed to other users"
    try:
        claims.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return f"{claims} cannot be created: {error.strerror}"
    return None if os.access(claims, os.W_OK) else f"{claims} cannot be written"


def closed_component(path: Path) -> Path | None:
    """Return the first directory on the way to `path` that other users cannot pass, or the file that they cannot read.

    Links are followed one by one, because each has its own path. A path that does not exist yet is checked as far as it
    exists. Access control lists are ignored: rights that they give beyond the mode do not count.
    """
    here = Path("/")
    left = [*path.absolute().parts[1:]]
    links = 0
    while left:
        if not _mode(here) & 0o001:
            return here
        step = here / left.pop(0)
        try:
            target = step.readlink()
        except FileNotFoundError:
            return None
        except OSError:
            here = step
            continue
        links += 1
        if links > _MOST_LINKS:
            return step
        left = [*(target.parts[1:] if target.is_absolute() else target.parts), *left]
        here = Path("/") if target.is_absolute() else here
    return here if not _mode(here) & (0o001 if here.is_dir() else 0o004) else None


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except PermissionError:
        return 0


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _is_mapped(uids: range) -> bool:
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        inside, _, count = (int(number) for number in line.split())
        if inside <= uids.start and uids.stop <= inside + count:
            return True
    return False
