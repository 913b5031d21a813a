"""The Claude CLI as sessions run it: a file that they can execute but not read, so that no tool can alter its process.

A tool runs as the same user as its CLI, so the kernel would let it write to `/proc/PID/mem` of the CLI and forge its
output. A program that its user cannot read is not dumpable while it runs (execve(2), ptrace(2)); then only root can
access its memory, environment, maps and descriptors in `/proc`. So sessions see the program root-owned with mode 0711,
at one path of their view. A file that already has this mode (as in the guest image) is shown as it is. Otherwise all
agents of a host share one copy per version, and its page cache. A mode belongs to the inode, so a hard link does not
suffice.

A script (`CLAUDE_CLI_PATH` may name one) must be readable for its interpreter. It is shown readable, with its npm
package, and nothing protects the memory of its process.
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
"""The folder of the copies; one per host."""
MODE = 0o711
_UNUSED_SECONDS = 14 * 86400.0
_FICLONE = 0x40049409


class SessionCli:
    """The CLI of an agent's sessions. `names` are the values of `argv[0]` that mean it.

    `shown` is the file to show at `protocol.CLI`, None for a script; `exposed` are paths that sessions read for it;
    `lock` is a descriptor whose lock keeps the copy in its store.
    """

    def __init__(
        self, names: frozenset[str], shown: str | None, exposed: tuple[str, ...], lock: int | None = None
    ) -> None:
        self.names, self.shown, self.exposed, self.lock = names, shown, exposed, lock


def session_cli(environment: Mapping[str, str], stores: tuple[str, ...]) -> SessionCli:
    """Return the CLI of this agent's sessions; if needed, copy it into the first of `stores` that can be written.

    Blocks while copying, once per version and host. Raises OSError.
    """
    names = {path for path in (environment.get("CLAUDE_CLI_PATH"), _bundled()) if path and os.path.isfile(path)}
    chosen = environment.get("CLAUDE_CLI_PATH") or _bundled()
    if chosen is None or not os.path.isfile(chosen):
        return SessionCli(frozenset(), None, ())
    real = os.path.realpath(chosen)
    if not _is_program(real):
        return SessionCli(frozenset(), None, (_package_of(real),))
    info = os.stat(real)
    if info.st_uid == 0 and info.st_mode & 0o7777 == MODE:
        return SessionCli(frozenset(names), real, ())
    for store in stores[:-1]:
        with suppress(OSError):
            copy, lock = _ensure_copy(real, store)
            return SessionCli(frozenset(names), copy, (), lock)
    copy, lock = _ensure_copy(real, stores[-1])
    return SessionCli(frozenset(names), copy, (), lock)


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


def _ensure_copy(source: str, store: str) -> tuple[str, int]:
    """Return the execute-only copy of a program in a store, created if it does not exist, and a descriptor whose lock
    keeps it there. Raises OSError."""
    os.makedirs(store, mode=0o755, exist_ok=True)
    folder = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        info = os.stat(source)
        version = f"{source}\0{info.st_dev}\0{info.st_ino}\0{info.st_size}\0{info.st_mtime_ns}"
        target = os.path.join(store, f"claude-{hashlib.sha256(version.encode()).hexdigest()[:16]}")
        if not _is_intact(target, info.st_size):
            _remove_unused(store)
            _copy(source, target)
        os.utime(target)
        lock = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_SH)
        return target, lock
    finally:
        os.close(folder)


def _is_intact(path: str, size: int) -> bool:
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return False
    return (info.st_size, info.st_uid, info.st_mode & 0o7777) == (size, 0, MODE)


def _copy(source: str, target: str) -> None:
    partial = f"{target}.partial"
    with suppress(FileNotFoundError):
        os.unlink(partial)
    try:
        with open(source, "rb") as reading, open(partial, "xb") as writing:
            try:
                fcntl.ioctl(writing.fileno(), _FICLONE, reading.fileno())
            except OSError:
                shutil.copyfileobj(reading, writing, 1 << 20)
            writing.flush()
            os.fchown(writing.fileno(), 0, 0)
            os.fchmod(writing.fileno(), MODE)
        os.rename(partial, target)
    except OSError:
        with suppress(FileNotFoundError):
            os.unlink(partial)
        raise


def _remove_unused(store: str) -> None:
    """Remove copies that no launcher requested for two weeks and that no running launcher locks."""
    for name in os.listdir(store):
        path = os.path.join(store, name)
        with suppress(OSError):
            if name.startswith("claude-") and time.time() - os.stat(path).st_mtime > _UNUSED_SECONDS:
                with open(path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while a launcher shows it to sessions
                    os.unlink(path)
