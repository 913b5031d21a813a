"""Limits of CPU, memory and processes by control groups, versions 1 and 2 (cgroups(7)).

- The agent joins its group before its first instruction, its processes inherit the group, and only root can leave it.
  So the limits apply to all of them together, and the group lists all of them.
- Groups are created below the manager's own group, so the limits of the manager's service apply to all agents together.
- If version 1 refuses a CPU limit because a group above allows less, the lower limit is enforced there.
- Whether limits are enforced is determined by creating a group, not from version numbers.

Rejected: rlimits for memory (per process, and for address space, of which the Claude CLI reserves tens of gigabytes);
`systemd-run` (not on every host, and not in containers).
"""

import errno
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PERIOD_MICROSECONDS = 100_000
_SWAP_FILES = ("memory.memsw.limit_in_bytes", "memory.swap.max")
_CONTROLLERS = {"cpu": "cores", "memory": "memory", "pids": "pids"}


@dataclass(frozen=True)
class Limits:
    """Limits of a group; None: no limit of its own. `processes` counts threads, as the kernel does."""

    cores: float | None
    memory_mb: int | None
    processes: int | None


Settings = Mapping[str, tuple[tuple[str, int | str], ...]]
"""By controller, the files to write and their values."""


def settings_of_version_1(limits: Limits) -> Settings:
    """Return the settings of version 1; see `cgroup-v1` and `sched-bwc` in the kernel's documentation."""
    settings: dict[str, tuple[tuple[str, int | str], ...]] = {}
    if limits.cores is not None:
        quota = int(limits.cores * _PERIOD_MICROSECONDS)
        settings["cpu"] = (("cpu.cfs_period_us", _PERIOD_MICROSECONDS), ("cpu.cfs_quota_us", quota))
    if limits.memory_mb is not None:
        memory = limits.memory_mb << 20
        # The second limits memory and swap together.
        settings["memory"] = (("memory.limit_in_bytes", memory), ("memory.memsw.limit_in_bytes", memory))
    if limits.processes is not None:
        settings["pids"] = (("pids.max", limits.processes),)
    return settings


def settings_of_version_2(limits: Limits) -> Settings:
    """Return the settings of version 2; see `cgroup-v2` in the kernel's documentation."""
    settings: dict[str, tuple[tuple[str, int | str], ...]] = {}
    if limits.cores is not None:
        settings["cpu"] = (("cpu.max", f"{int(limits.cores * _PERIOD_MICROSECONDS)} {_PERIOD_MICROSECONDS}"),)
    if limits.memory_mb is not None:
        settings["memory"] = (("memory.max", limits.memory_mb << 20), ("memory.swap.max", 0))
    if limits.processes is not None:
        settings["pids"] = (("pids.max", limits.processes),)
    return settings


@dataclass(frozen=True)
class Cgroups:
    """Where groups are created: a parent directory for each controller. Version 2 has the same one for all."""

    bases: Mapping[str, Path]
    settings: Callable[[Limits], Settings]

    @property
    def enforced(self) -> frozenset[str]:
        """The resources that groups can limit here, from "cores", "memory" and "pids"."""
        return frozenset(_CONTROLLERS[controller] for controller in self.bases)

    def paths(self, name: str) -> tuple[str, ...]:
        """Return the directories of the groups with this name, which need not exist."""
        return tuple(dict.fromkeys(str(base / name) for base in self.bases.values()))

    def create(self, name: str, limits: Limits) -> None:
        """Create the groups with this name and set their limits. Raises OSError, after which none exist."""
        try:
            for path in self.paths(name):
                os.mkdir(path, 0o755)
            settings = self.settings(limits)
            for controller, base in self.bases.items():
                for file, value in settings.get(controller, ()):
                    _limit(base / name / file, value)
        except OSError:
            remove(self.paths(name), patience=0)
            raise

    def below(self, name: str) -> "Cgroups":
        """Return where groups below the group with this name are created. Raises OSError.

        Under version 2 the group itself cannot contain processes afterwards.
        """
        for path in self.paths(name):
            _enable(Path(path))
        return Cgroups({controller: base / name for controller, base in self.bases.items()}, self.settings)

    def limit_memory(self, name: str, memory_mb: int) -> None:
        """Change the memory limit of a group. Raises OSError (EBUSY under version 1: more is in use)."""
        base = self.bases.get("memory")
        if base is None:
            return
        files = self.settings(Limits(None, memory_mb, None))["memory"]
        try:
            for file, value in files:
                _limit(base / name / file, value)
        except OSError as error:
            if (
                error.errno != errno.EINVAL
            ):  # version 1: the memory limit cannot exceed that of memory and swap together
                raise
            for file, value in reversed(files):
                _limit(base / name / file, value)


def detect(process: Path = Path("/proc/self")) -> Cgroups | None:
    """Return where this process may create groups with limits, None if it may not.

    Reads `process`/cgroup and `process`/mountinfo (proc_pid_mountinfo(5)).
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
    usable = {controller: base for controller, base in sorted(version_1.items()) if _can_create_groups(base)}
    if usable:
        return Cgroups(usable, settings_of_version_1)
    # Controllers cannot be enabled for groups below a group with processes, except for the root. If the manager runs in
    # its own group below that of its service, the parent is the group of the service.
    for base in (unified, unified.parent) if unified else ():
        enabled = _enable(base)
        if enabled and _can_create_groups(base):
            return Cgroups(dict.fromkeys(sorted(enabled), base), settings_of_version_2)
    return None


def memory_in_use(group: Path) -> int:
    """Return the bytes that a group and those below it use and the kernel cannot reclaim: all except file cache.

    Raises OSError.
    """
    with suppress(FileNotFoundError):
        return _without_file_cache(group, "memory.usage_in_bytes", "total_")
    return _without_file_cache(group, "memory.current", "")


def charged_bytes(groups: Iterable[str]) -> int | None:
    """Return `memory_in_use` of the first of these groups that counts memory, None if none does."""
    for group in groups:
        with suppress(OSError):
            return memory_in_use(Path(group))
    return None


def _without_file_cache(group: Path, usage: str, prefix: str) -> int:
    used = int((group / usage).read_text())
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return max(0, used - sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive")))


def number_in(group: Path, *files: str, key: str | None = None) -> int | None:
    """Return the number in the first existing file, or in its line `key`; None if there is no limit or no file."""
    for file in files:
        with suppress(OSError, ValueError, KeyError):
            text = (group / file).read_text()
            return int(text if key is None else dict(line.split(None, 1) for line in text.splitlines())[key])
    return None


def members(groups: Iterable[str]) -> set[int]:
    """Return the pids of all processes in the groups and below. Groups that do not exist have none."""
    found: set[int] = set()
    for group in _with_those_below(groups):
        with suppress(FileNotFoundError, NotADirectoryError), open(os.path.join(group, "cgroup.procs")) as file:
            found.update(int(pid) for pid in file.read().split())
    return found


def remove(groups: Iterable[str], *, patience: float) -> None:
    """Remove empty groups and those below them. Missing groups are fine.

    The kernel may need a moment after the last process has ended: waits at most `patience` seconds. Raises OSError
    (EBUSY) for a group that is in use after that.
    """
    deadline = time.monotonic() + patience
    for group in _with_those_below(groups):
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


def _with_those_below(groups: Iterable[str]) -> list[str]:
    """Return the directories of the groups and of those below them, children first."""
    return [path for group in groups for path in ([path for path, _, _ in os.walk(group, topdown=False)] or [group])]


def _own_directory(point: Path, root: str, own: str) -> Path:
    """Return this process's group below a mount point. In a container, the mount may show only a subtree (`root`)."""
    below = Path(own.removeprefix(root if root != "/" else "").lstrip("/"))
    # The path of a group outside of this process's namespace begins with "..".
    outside = ".." in below.parts or not (point / below).is_dir()
    return point if outside else point / below


def _can_create_groups(base: Path) -> bool:
    probe = base / f"hypercore-probe-{secrets.token_hex(4)}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True


def _enable(base: Path) -> frozenset[str]:
    """Enable as many of our controllers as possible for groups below `base`; return the enabled ones."""
    for controller in _CONTROLLERS:
        with suppress(OSError):
            _write(base / "cgroup.subtree_control", f"+{controller}")
    try:
        return frozenset((base / "cgroup.subtree_control").read_text().split()) & _CONTROLLERS.keys()
    except OSError:
        return frozenset()


def _write(path: Path, value: int | str) -> None:
    # Without O_CREAT: a missing file means a missing controller and must not be created.
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, str(value).encode())
    finally:
        os.close(descriptor)


def _limit(path: Path, value: int | str) -> None:
    try:
        _write(path, value)
    except OSError as error:
        lower_limit_above = path.name == "cpu.cfs_quota_us" and error.errno == errno.EINVAL
        if not lower_limit_above and path.name not in _SWAP_FILES:
            raise
