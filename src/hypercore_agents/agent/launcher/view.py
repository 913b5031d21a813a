"""The view: the minimal root file system of a session, and of the server.

    /usr /bin /lib* /sbin, named parts of /etc, exposed paths   read-only, no set-user-id, no devices
    /etc/passwd, group, hosts, ...                              generated (`generated_files`)
    /session                                                    the session's folder, writable
    /opt/claude-code/claude                                     the session's Claude CLI, if it must not be readable
    /tmp /var/tmp /run /dev/shm                                 private, in memory, limited
    /proc                                                       of the session's pid namespace; the host's state hidden
    /dev                                                        null, zero, full, random, urandom

The server's view has its folder at `/agent` instead, and the interpreter's folders: they may be where other users
cannot read. So no path leads to another session's folder, to state of the server or the host, or to a listening socket.
Rejected: the host's root, or all of its `/etc` and `/opt`, with parts hidden: an overlooked part would be visible.
"""

from __future__ import annotations

import os
import stat

from hypercore_agents.agent.launcher import generated_files, kernel
from hypercore_agents.agent.launcher.protocol import CLI, FOLDER
from hypercore_agents.kit.linux.session_view import ETC, ETC_OF_SERVER, SYSTEM, etc_paths

_DEVICES = ("null", "zero", "full", "random", "urandom")
_LINKS = (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
          ("stderr", "/proc/self/fd/2"))  # fmt: skip
_SCRATCH = ("/tmp", "/dev/shm", "/run")  # noqa: S108 (private to the view)
_BASE = "/tmp"  # noqa: S108 (a mount point in this process's mount namespace)
_GENERATED_PROC = "/run/.proc"


def enter_session(
    folder: str, exposed: tuple[str, ...], *, uid: int, scratch_mb: int, memory_mb: int, cli: str | None = None
) -> None:
    """Build a session's view in this process's new mount namespace and enter it. Raises OSError.

    `cli` is the file to show at `CLI`.
    """
    files = generated_files.etc(uid, f"{FOLDER}/home")
    _enter(folder, exposed, ETC, files, scratch_mb=scratch_mb, at=FOLDER, cli=cli, proc=generated_files.proc(memory_mb))


def enter_server(folder: str, exposed: tuple[str, ...], *, uid: int, scratch_mb: int, at: str) -> None:
    """Build the agent server's view, with its folder at `at`, and enter it. Raises OSError."""
    files = generated_files.etc(uid, at, name="agent")
    names = [name for name in ETC_OF_SERVER if os.path.exists(f"/etc/{name}")]
    for name in names:
        files.pop(name, None)
    _enter(folder, exposed, (*ETC, *names), files, scratch_mb=scratch_mb, at=at, cli=None, proc={})


def _enter(
    folder: str,
    exposed: tuple[str, ...],
    etc: tuple[str, ...],
    etc_files: dict[str, str],
    *,
    scratch_mb: int,
    at: str,
    cli: str | None,
    proc: dict[str, str],
) -> None:
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    # Opened before the base covers the paths below it.
    sources = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in _outermost(exposed) if os.path.exists(path)}
    links = {path: os.readlink(path) for path in SYSTEM if os.path.islink(path)}
    for path in etc_paths(etc):
        if os.path.islink(path) and os.path.realpath(path).startswith("/usr/"):
            links[path] = os.readlink(path)
        elif os.path.exists(path):
            sources.setdefault(path, os.open(path, os.O_PATH | os.O_CLOEXEC))
    program = None if cli is None else os.open(cli, os.O_PATH | os.O_CLOEXEC)
    own = os.open(folder, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    devices = {name: os.open(f"/dev/{name}", os.O_PATH | os.O_CLOEXEC) for name in _DEVICES}
    kernel.mount("tmpfs", _BASE, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=2m,mode=755")
    late = [path for path in sources if path.startswith(tuple(f"{above}/" for above in _SCRATCH))]
    for path, to in links.items():
        os.makedirs(os.path.dirname(_BASE + path), mode=0o755, exist_ok=True)
        os.symlink(to, _BASE + path)
    for path, source in sources.items():
        if path not in links and path not in late:
            _bind(source, path, writable=False)
    if program is not None:
        kernel.bind(f"/proc/self/fd/{program}", _create_target(CLI, folder=False), executable=True)
        os.close(program)
    for name, text in etc_files.items():
        _write(f"/etc/{name}", text)
    os.symlink("/proc/mounts", f"{_BASE}/etc/mtab")
    _bind(own, at, writable=True)
    for name, source in devices.items():
        target = _create_target(f"/dev/{name}", folder=False)
        kernel.mount(f"/proc/self/fd/{source}", target, flags=kernel.MS_BIND)
    for name, to in _LINKS:
        os.symlink(to, f"{_BASE}/dev/{name}")
    _create_target(_GENERATED_PROC)
    for name, text in proc.items():
        _write(f"{_GENERATED_PROC}/{name}", text)
    hidden = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("proc", _create_target("/proc"), "proc", hidden)
    if proc:
        _hide_host(proc)
    for path in _SCRATCH:
        size = 1 if path == "/run" else scratch_mb
        options = f"size={size}m,nr_inodes={max(1, size) * 256},mode=1777"
        kernel.mount("tmpfs", _create_target(path), "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    for path in late:  # exposed paths below a scratch folder; mounted earlier, the tmpfs would cover them
        _bind(sources[path], path, writable=False)
    os.symlink("/tmp", _create_target("/var") + "/tmp")  # noqa: S108
    for descriptor in (*sources.values(), own, *devices.values()):
        os.close(descriptor)
    kernel.enter_root(_BASE)
    kernel.mount("tmpfs", "/", flags=kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID)


def _hide_host(files: dict[str, str]) -> None:
    """Cover the files and folders of this view's `/proc` that reveal the host."""
    empty = _create_target(f"{_GENERATED_PROC}/.empty")
    for name in generated_files.HIDDEN_FOLDERS:
        if os.path.isdir(f"{_BASE}/proc/{name}"):
            kernel.bind(empty, f"{_BASE}/proc/{name}")
    for name in files:
        if os.path.isfile(f"{_BASE}/proc/{name}"):
            kernel.bind(f"{_BASE}{_GENERATED_PROC}/{name}", f"{_BASE}/proc/{name}")


def _outermost(exposed: tuple[str, ...]) -> list[str]:
    """Return the system's and the exposed paths without those below others, shortest first."""
    chosen: list[str] = []
    for path in sorted({*SYSTEM, *(os.path.realpath(path) for path in exposed)}, key=len):
        if not any(path.startswith(f"{above}/") for above in chosen):
            chosen.append(path)
    return chosen


def _bind(source: int, path: str, *, writable: bool) -> None:
    target = _create_target(path, folder=stat.S_ISDIR(os.fstat(source).st_mode))
    kernel.bind(f"/proc/self/fd/{source}", target, writable=writable)


def _write(path: str, text: str) -> None:
    with open(_create_target(path, folder=False), "w") as file:
        file.write(text)


def _create_target(path: str, *, folder: bool = True) -> str:
    target = _BASE + path
    os.makedirs(target if folder else os.path.dirname(target), mode=0o755, exist_ok=True)
    if not folder:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
    return target
