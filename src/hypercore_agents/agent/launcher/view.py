"""What a session, and the server too, sees of the file system: a root of its own with little in it.

    /usr /bin /lib* /sbin /etc /opt and what the launcher was told to expose   read-only, no set-user-id, no devices
    /session                                                                  its own folder, writable
    /tmp /var/tmp /run /dev/shm                                               its own memory, limited
    /proc                                                                     of its own pid namespace
    /dev                                                                      null, zero, full, random, urandom

The server has its own folder at `/agent` instead, and the interpreter's folders, wherever they are: it need not be
installed where other users may look. So no other session's folder, no state of the server or the host, and no socket
that somebody listens on has a path here. Rejected: the host's root with parts of it hidden (what is forgotten is open).
"""

from __future__ import annotations

import os
import stat

from hypercore_agents.agent.launcher import kernel
from hypercore_agents.agent.launcher.protocol import FOLDER

EXPOSED = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/opt")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_LINKS = (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
          ("stderr", "/proc/self/fd/2"))  # fmt: skip
_SCRATCH = ("/tmp", "/dev/shm", "/run")  # noqa: S108 (of its own)
_BASE = "/tmp"  # noqa: S108 (a mount point in a mount namespace of our own)


def enter(folder: str, exposed: tuple[str, ...], *, scratch_mb: int, at: str = FOLDER) -> None:
    """Build the view in this process's fresh mount namespace and enter it, `folder` at `at`. Raises OSError."""
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    # Opened before the base covers what may lie below it.
    sources = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in _whole(exposed) if os.path.exists(path)}
    own = os.open(folder, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    devices = {name: os.open(f"/dev/{name}", os.O_PATH | os.O_CLOEXEC) for name in _DEVICES}
    links = {path: os.readlink(path) for path in EXPOSED if os.path.islink(path)}
    kernel.mount("tmpfs", _BASE, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=755")
    late = [path for path in sources if path.startswith(tuple(f"{above}/" for above in _SCRATCH))]
    for path, source in sources.items():
        if path in links:
            os.symlink(links[path], _BASE + path)
        elif path not in late:
            _bind(source, path, writable=False)
    _bind(own, at, writable=True)
    for name, source in devices.items():
        target = _make(f"/dev/{name}", folder=False)
        kernel.mount(f"/proc/self/fd/{source}", target, flags=kernel.MS_BIND)
    for name, to in _LINKS:
        os.symlink(to, f"{_BASE}/dev/{name}")
    for path in _SCRATCH:
        size = 1 if path == "/run" else scratch_mb
        options = f"size={size}m,nr_inodes={max(1, size) * 256},mode=1777"
        kernel.mount("tmpfs", _make(path), "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    for path in late:  # what is exposed from below a scratch folder would else be under it
        _bind(sources[path], path, writable=False)
    os.symlink("/tmp", _make("/var") + "/tmp")  # noqa: S108
    hidden = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("proc", _make("/proc"), "proc", hidden)
    for descriptor in (*sources.values(), own, *devices.values()):
        os.close(descriptor)
    kernel.enter_root(_BASE)
    kernel.mount("tmpfs", "/", flags=kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID)


def _whole(exposed: tuple[str, ...]) -> list[str]:
    """Return the paths without those that lie below others, shortest first."""
    chosen: list[str] = []
    for path in sorted({*EXPOSED, *(os.path.realpath(path) for path in exposed)}, key=len):
        if not any(path.startswith(f"{above}/") for above in chosen):
            chosen.append(path)
    return chosen


def _bind(source: int, path: str, *, writable: bool) -> None:
    target = _make(path, folder=stat.S_ISDIR(os.fstat(source).st_mode))
    kernel.bind(f"/proc/self/fd/{source}", target, writable=writable)


def _make(path: str, *, folder: bool = True) -> str:
    target = _BASE + path
    os.makedirs(target if folder else os.path.dirname(target), mode=0o755, exist_ok=True)
    if not folder:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
    return target
