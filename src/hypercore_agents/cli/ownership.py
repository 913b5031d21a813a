"""Ownership of a state folder: the process that holds its lock runs the platform. A record alone is no proof."""

import contextlib
import fcntl
import json
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.compute.host.identity import ProcessIdentity, is_alive


@contextlib.contextmanager
def holding(state: Path, url: str) -> Iterator[None]:
    """Lock a state folder; `up.json` next to the lock names the process and the URL of its manager.

    Raises CommandError if another process holds the lock.
    """
    with (state / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CommandError(f"another `up` uses {state}; stop it with: hypercore-agents down") from None
        record = state / "up.json"
        try:
            record.write_text(json.dumps({"pid": os.getpid(), "url": url}))
            yield
        finally:
            record.unlink(missing_ok=True)
            (state / "up.lock").unlink(missing_ok=True)


def who_runs(state: Path) -> dict[str, Any] | None:
    """Return the record of the `up` process that holds the lock of this folder, None if none does."""
    try:
        with (state / "up.lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                record = json.loads((state / "up.json").read_text())
                return record if isinstance(record, dict) else None
    except (OSError, ValueError):
        return None
    return None


def running_below(state: Path) -> list[int]:
    """Return the pids of running sandboxes that have a record in a state folder."""
    alive = []
    for record in (*state.glob("sandboxes/*/record.json"), *state.glob("microvm/sandboxes/*/record.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            identity = ProcessIdentity.from_json(json.loads(record.read_text())["shim"])
            if identity is not None and is_alive(identity):
                alive.append(identity.pid)
    return alive


def ended(pid: int, seconds: float) -> bool:
    """Send SIGTERM and wait; return whether the process ended. A pidfd is safe against reuse of the pid."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        return bool(select.select([process], [], [], seconds)[0])
    except ProcessLookupError:
        return True
    finally:
        os.close(process)
