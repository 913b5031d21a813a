"""The Claude CLI as sessions run it: a file that they can execute and not read, so that no tool can change the process.

A tool runs as the same user as its CLI, so the kernel would let it write to `/proc/PID/mem` of the CLI and put words
into its mouth. A program that its user cannot read is not dumpable once it runs (execve(2), ptrace(2)), and then its
memory, environment, maps and descriptors in `/proc` are root's alone. So sessions get the program root-owned with mode
0711, at one path of their view. Where the file is like that already (in an image of ours) it is shown as it is;
otherwise there is one copy per host and version, which all agents share with their page cache. A mode belongs to the
inode, so a hard link cannot do it.

A script (`CLAUDE_CLI_PATH` may name one) has to be read by its interpreter, so it is shown readable, with the npm
package that it belongs to, and nothing protects its memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import time
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

STORE = "/var/lib/hypercore-agents/cli"
"""Where the copies are; one place per host."""
MODE = 0o711
_UNUSED_SECONDS = 14 * 86400.0
_FICLONE = 0x40049409


class SessionCli:
    """Which program a session's `argv[0]` means. `shown` is the file to show at `protocol.CLI`, None for a script;
    `exposed` are paths that sessions read for it, `held` a descriptor that keeps a copy in its store."""

    def __init__(
        self, names: frozenset[str], shown: str | None, exposed: tuple[str, ...], held: int | None = None
    ) -> None:
        self.names, self.shown, self.exposed, self.held = names, shown, exposed, held


def session_cli(environment: Mapping[str, str], stores: tuple[str, ...]) -> SessionCli:
    """Return the CLI of this agent's sessions, copied into the first of `stores` that takes it if need be.

    Blocks for the copy, once per version and host. Raises OSError.
    """
    names = {path for path in (environment.get("CLAUDE_CLI_PATH"), _bundled()) if path and os.path.isfile(path)}
    chosen = environment.get("CLAUDE_CLI_PATH") or _bundled()
    if chosen is None or not os.path.isfile(chosen):
        return SessionCli(frozenset(), None, ())
    real = os.path.realpath(chosen)
    if not _is_program(real):
        return SessionCli(frozenset(), None, (_package_of(real),))
    found = os.stat(real)
    if found.st_uid == 0 and found.st_mode & 0o7777 == MODE:
        return SessionCli(frozenset(names), real, ())
    for store in stores[:-1]:
        with suppress(OSError):
            copy, held = _copied(real, store)
            return SessionCli(frozenset(names), copy, (), held)
    copy, held = _copied(real, stores[-1])
    return SessionCli(frozenset(names), copy, (), held)


def _bundled() -> str | None:
    """Return the path of the CLI that comes with the Agent SDK."""
    sdk = importlib.util.find_spec("claude_agent_sdk")
    places = (sdk.submodule_search_locations or []) if sdk else []
    return next((os.path.join(path, "_bundled", "claude") for path in places), None)


def _is_program(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"


def _package_of(path: str) -> str:
    """Return the folder of the npm package that a script belongs to, or the script itself."""
    folder = os.path.dirname(path)
    while "node_modules" in folder.split("/"):
        if os.path.isfile(f"{folder}/package.json"):
            return folder
        folder = os.path.dirname(folder)
    return path


def _copied(source: str, store: str) -> tuple[str, int]:
    """Return the execute-only copy of a program in a store, made if it is not there, and a descriptor whose lock keeps
    it there. Raises OSError."""
    os.makedirs(store, mode=0o755, exist_ok=True)
    folder = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        found = os.stat(source)
        named = f"{source}\0{found.st_dev}\0{found.st_ino}\0{found.st_size}\0{found.st_mtime_ns}"
        target = os.path.join(store, f"claude-{hashlib.sha256(named.encode()).hexdigest()[:16]}")
        if not _is_whole(target, found.st_size):
            _drop_unused(store)
            _copy(source, target)
        os.utime(target)
        held = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        fcntl.flock(held, fcntl.LOCK_SH)
        return target, held
    finally:
        os.close(folder)


def _is_whole(path: str, size: int) -> bool:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return (found.st_size, found.st_uid, found.st_mode & 0o7777) == (size, 0, MODE)


def _copy(source: str, target: str) -> None:
    making = f"{target}.making"
    with suppress(FileNotFoundError):
        os.unlink(making)
    try:
        with open(source, "rb") as reading, open(making, "xb") as writing:
            try:
                fcntl.ioctl(writing.fileno(), _FICLONE, reading.fileno())
            except OSError:
                shutil.copyfileobj(reading, writing, 1 << 20)
            writing.flush()
            os.fchown(writing.fileno(), 0, 0)
            os.fchmod(writing.fileno(), MODE)
        os.rename(making, target)
    except OSError:
        with suppress(FileNotFoundError):
            os.unlink(making)
        raise


def _drop_unused(store: str) -> None:
    """Remove copies that no launcher asked for in a while and none that runs may still need."""
    for name in os.listdir(store):
        path = os.path.join(store, name)
        with suppress(OSError):
            if name.startswith("claude-") and time.time() - os.stat(path).st_mtime > _UNUSED_SECONDS:
                with open(path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by each launcher that shows it to sessions
                    os.unlink(path)
