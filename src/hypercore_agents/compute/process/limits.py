"""Limits of CPU, memory and processes by control groups, version 1 and 2 (cgroups(7)).

- The agent is put into its group before its first instruction, everything that it starts is born there, and only root
  gets out; so the limits hold for all of it together, and the group names all of it.
- Groups are made below the one that the manager runs in, so that the limits of the manager's own service hold for all
  agents together.
- A limit that a controller refuses because a group above allows less is already enforced there.
- Which limits are enforced is found out by making a group, not by looking at versions.

Rejected: rlimits for memory (per process, and of address space, of which the Claude CLI reserves tens of gigabytes);
`systemd-run` (not everywhere there is systemd, and never in a container).
"""

import errno
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PERIOD_MICROSECONDS = 100_000
_CONTROLLERS = {"cpu": "cores", "memory": "memory", "pids": "pids"}


@dataclass(frozen=True)
class Limits:
    """What an agent may use. `processes` counts threads, as the kernel does."""

    cores: int
    memory_mb: int
    processes: int


class Cgroups(ABC):
    """Where groups are made. `enforced` holds "cores", "memory", "pids", as far as they are."""

    enforced: frozenset[str]

    @abstractmethod
    def paths(self, name: str) -> tuple[str, ...]:
        """Return the directories of the groups with this name, whether they exist or not."""

    def create(self, paths: tuple[str, ...], limits: Limits) -> None:
        """Make the groups of one agent, with their limits. Raises OSError, and then there are none."""
        try:
            for path in paths:
                os.mkdir(path, 0o755)
            self._limit(tuple(Path(path) for path in paths), limits)
        except OSError:
            remove(paths, patience=0)
            raise

    @abstractmethod
    def _limit(self, groups: tuple[Path, ...], limits: Limits) -> None:
        """Set the limits of groups that exist. Raises OSError."""


class CgroupsV1(Cgroups):
    """One hierarchy per controller; a group in each."""

    def __init__(self, bases: dict[str, Path]) -> None:
        """Make groups below `bases`, which maps controllers to directories; two may share one."""
        self._bases = bases
        self.enforced = frozenset(_CONTROLLERS[controller] for controller in bases)

    def paths(self, name: str) -> tuple[str, ...]:
        """Return one directory per hierarchy."""
        return tuple(dict.fromkeys(str(base / name) for base in self._bases.values()))

    def _limit(self, groups: tuple[Path, ...], limits: Limits) -> None:
        for controller, base in self._bases.items():
            group = next(group for group in groups if group.parent == base)
            if controller == "cpu":
                _write(group / "cpu.cfs_period_us", _PERIOD_MICROSECONDS)
                _write_unless_less_above(group / "cpu.cfs_quota_us", limits.cores * _PERIOD_MICROSECONDS)
            elif controller == "memory":
                _write(group / "memory.limit_in_bytes", limits.memory_mb << 20)
                # Memory and swap together; missing where swap is not accounted.
                with suppress(OSError):
                    _write(group / "memory.memsw.limit_in_bytes", limits.memory_mb << 20)
            else:
                _write(group / "pids.max", limits.processes)


class CgroupsV2(Cgroups):
    """The unified hierarchy; one group per agent."""

    def __init__(self, base: Path, controllers: Iterable[str]) -> None:
        """Make groups below `base`, where `controllers` are enabled for them."""
        self._base = base
        self._controllers = frozenset(controllers)
        self.enforced = frozenset(_CONTROLLERS[controller] for controller in self._controllers)

    def paths(self, name: str) -> tuple[str, ...]:
        """Return the one directory."""
        return (str(self._base / name),)

    def _limit(self, groups: tuple[Path, ...], limits: Limits) -> None:
        (group,) = groups
        if "cpu" in self._controllers:
            _write(group / "cpu.max", f"{limits.cores * _PERIOD_MICROSECONDS} {_PERIOD_MICROSECONDS}")
        if "memory" in self._controllers:
            _write(group / "memory.max", limits.memory_mb << 20)
            with suppress(OSError):
                _write(group / "memory.swap.max", 0)
        if "pids" in self._controllers:
            _write(group / "pids.max", limits.processes)


def detect(process: Path = Path("/proc/self")) -> Cgroups | None:
    """Return where this process may make groups that limit something, None where it may not.

    Looks at `process`/cgroup and `process`/mountinfo (proc_pid_mountinfo(5)).
    """
    own: dict[str, str] = {}
    for line in (process / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    version_1: dict[str, Path] = {}
    unified: Path | None = None
    for line in (process / "mountinfo").read_text().splitlines():
        mount, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        root, point = mount.split(" ")[3:5]
        if kind == "cgroup":
            for controller in _CONTROLLERS.keys() & set(options.split(",")):
                version_1[controller] = _own_directory(Path(point), root, own.get(controller, "/"))
        elif kind == "cgroup2":
            unified = _own_directory(Path(point), root, own.get("", "/"))
    usable = {controller: base for controller, base in sorted(version_1.items()) if _can_make_groups(base)}
    if usable:
        return CgroupsV1(usable)
    # Where processes run no controller can be enabled for groups below (but at the root); a manager that was put
    # into a group of its own below its service's has the service's group above.
    for base in (unified, unified.parent) if unified else ():
        enabled = _enable(base)
        if enabled and _can_make_groups(base):
            return CgroupsV2(base, enabled)
    return None


def members(groups: Iterable[str]) -> set[int]:
    """Return the pids of all processes in the groups; one that does not exist has none."""
    found: set[int] = set()
    for group in groups:
        with suppress(FileNotFoundError), open(os.path.join(group, "cgroup.procs")) as file:
            found.update(int(pid) for pid in file.read().split())
    return found


def remove(groups: Iterable[str], *, patience: float) -> None:
    """Remove empty groups; one that is gone is fine.

    The kernel may need a moment after the last process ended: waits at most `patience` seconds. Raises OSError
    (EBUSY) for one that is still in use then.
    """
    deadline = time.monotonic() + patience
    for group in groups:
        pause = 0.002
        while True:
            try:
                os.rmdir(group)
            except FileNotFoundError:
                break
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, 0.1)


def _own_directory(point: Path, root: str, own: str) -> Path:
    """Return this process's group below a mount point. In a container the mount may show only a part (`root`)."""
    below = own.removeprefix(root if root != "/" else "")
    directory = point / below.lstrip("/")
    return directory if directory.is_dir() else point


def _can_make_groups(base: Path) -> bool:
    probe = base / f"hypercore-probe-{secrets.token_hex(4)}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True


def _enable(base: Path) -> frozenset[str]:
    """Enable our controllers for groups below `base` as far as they can be; return those that are enabled."""
    for controller in _CONTROLLERS:
        with suppress(OSError):
            _write(base / "cgroup.subtree_control", f"+{controller}")
    try:
        return frozenset((base / "cgroup.subtree_control").read_text().split()) & _CONTROLLERS.keys()
    except OSError:
        return frozenset()


def _write(path: Path, value: int | str) -> None:
    # Without O_CREAT: what is not there is a controller that is not, and must not become a file.
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, str(value).encode())
    finally:
        os.close(descriptor)


def _write_unless_less_above(path: Path, value: int) -> None:
    try:
        _write(path, value)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
