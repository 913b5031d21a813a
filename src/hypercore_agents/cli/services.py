"""Checks of `doctor` for the running roles, the store, the blob store, and their clocks.

The local clock is compared with the `Date` header of each server at `/ready` and with PostgreSQL's clock. A machine
with a wrong clock refuses valid tokens and certificates.
"""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from hypercore_agents.cli.findings import Finding, State
from hypercore_agents.cli.local_requests import open_directly
from hypercore_agents.manager.settings import ManagerSettings

_CLOCK_SECONDS = 30.0
_STORE_RUNBOOK = "see docs/runbooks/store-unavailable.md"
_REMEDIES = {
    "password authentication failed": "correct user and password in DATABASE_URL",
    "no password supplied": "put the password into DATABASE_URL",
    "role": "create the user, or correct it in DATABASE_URL",
    "database": "create the database, or correct its name in DATABASE_URL",
    "failed to resolve host": "correct the host in DATABASE_URL",
    "connection": "start PostgreSQL, or correct host and port in DATABASE_URL",
    "no answer": "start PostgreSQL, or correct host and port in DATABASE_URL",
}
"""Remedies by fragments of the driver's messages; the first match applies."""


@dataclass(frozen=True)
class _Answer:
    """The answer of a role at `/ready`: `nothing` (no listener), `foreign`, `ready`, `failing`; `date` is its clock."""

    state: str
    message: str = ""
    date: float | None = None


def roles() -> Iterator[Finding]:
    """Yield whether manager and gateway run, and whether they are healthy."""
    settings = ManagerSettings()
    manager_url = f"http://{settings.listen_addr}"
    manager, gateway = _probe(manager_url), _probe(settings.sandbox_gateway_url)
    if gateway.state == "nothing" and manager.state in ("ready", "failing"):
        yield _role("manager", manager_url, "LISTEN_ADDR", manager)
        yield Finding(
            "gateway",
            "missing",
            f"nothing answers at {settings.sandbox_gateway_url}, but a manager is running",
            "start it: hypercore-agents gateway; or set GATEWAY_ADDR or GATEWAY_URL to its address",
        )
    else:
        yield _role("manager", manager_url, "LISTEN_ADDR", manager)
        yield _role("gateway", settings.sandbox_gateway_url, "GATEWAY_ADDR", gateway)
    if manager.state == "ready":
        yield from _dependencies(manager_url)
    yield from _clock("the manager", manager.date)
    yield from _clock("the gateway", gateway.date)


def store() -> Iterator[Finding]:
    """Yield whether the store answers, matches this version, and belongs to this machine and key ring."""
    from hypercore_agents.api.errors import Unavailable
    from hypercore_agents.compute.registry import LOCAL_BACKENDS
    from hypercore_agents.kit.linux.state_location import StateLocation
    from hypercore_agents.store.database import Database
    from hypercore_agents.store.inspection import inspect_store

    settings = ManagerSettings()
    path = settings.state_dir / "store.db"
    if settings.database_url is None and not path.exists():
        yield Finding("database", "ok", f"{path} is created at the first start")
        return
    shown = Database(settings.store_url).shown_url
    try:
        facts = asyncio.run(inspect_store(settings.store_url, settings.key_path))
    except Unavailable as error:
        yield Finding("database", "missing", f"{shown}: {error.message}"[:300], _remedy(error.message))
        return
    if facts.schema == "newer":
        remedy = "run that version, or restore a backup from before the upgrade"
        yield Finding("database", "missing", f"{shown} was written by a newer version", remedy)
    elif facts.schema == "current":
        yield Finding("database", "ok", shown)
    else:
        yield Finding("database", "ok", f"{shown}; its schema is migrated at the next start")
    if facts.key_ring is not None:
        yield Finding("key ring", "missing", facts.key_ring, "see docs/runbooks/moving.md")
    if facts.state_location is not None and settings.compute_backend in LOCAL_BACKENDS and settings.state_dir.exists():
        here = StateLocation.of(settings.state_dir)
        if here.difference_from(facts.state_location):
            where = f"host {facts.state_location.name}, STATE_DIR={facts.state_location.folder}"
            yield Finding("store owner", "missing", f"the store belongs to {where}", "see docs/runbooks/moving.md")
    yield from _clock("PostgreSQL", facts.clock)


def blob_store() -> Iterator[Finding]:
    """Yield whether S3 accepts an object. A folder is covered by the check of the disk."""
    from hypercore_agents.api.errors import Unavailable
    from hypercore_agents.store.blobs import Blobs

    settings = ManagerSettings()
    if settings.blob_url is None or settings.blob_url.startswith("file://"):
        return
    try:
        asyncio.run(Blobs(settings.blob_url, Path("/nonexistent")).check())
    except Unavailable as error:
        yield Finding("blob store", "missing", error.message, "see docs/runbooks/blobs-unavailable.md")
    else:
        yield Finding("blob store", "ok", settings.blob_url)


def _role(name: str, url: str, variable: str, answer: _Answer) -> Finding:
    address = url.removeprefix("http://")
    if answer.state == "nothing":
        return Finding(name, "ok", f"{address} is free")
    if answer.state == "ready":
        return Finding(name, "ok", f"answers at {address}")
    if answer.state == "failing":
        remedy = _STORE_RUNBOOK if "store" in answer.message else "see its log"
        return Finding(name, "missing", f"runs at {address} and is not ready: {answer.message}", remedy)
    return Finding(name, "missing", f"another program listens on {address}", f"stop it, or set {variable}")


def _probe(url: str) -> _Answer:
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=2):
            pass
    except OSError:
        return _Answer("nothing")
    try:
        with open_directly(f"{url}/ready", seconds=8) as answer:
            body, date = answer.read(4096), answer.headers["date"]
    except HTTPError as error:
        return _failing(error.read(4096))
    except (URLError, OSError):
        return _Answer("foreign")
    return _Answer("ready", date=_seconds(date)) if b'"ready"' in body else _Answer("foreign")


def _failing(body: bytes) -> _Answer:
    try:
        error = json.loads(body)["error"]
        return _Answer("failing", str(error["message"])) if "request_id" in error else _Answer("foreign")
    except (ValueError, KeyError, TypeError):
        return _Answer("foreign")


def _dependencies(url: str) -> Iterator[Finding]:
    """Yield the failed dependencies that a running manager reports."""
    try:
        with open_directly(f"{url}/health", seconds=20) as answer:
            body = answer.read(65536)
    except HTTPError as error:
        body = error.read(65536)
    except (URLError, OSError):
        return
    try:
        dependencies = json.loads(body)["dependencies"]
        for name, dependency in dependencies.items():
            if dependency["status"] != "ok":
                state: State = "missing" if dependency["required"] else "warning"
                yield Finding(f"manager's {name}", state, str(dependency["error"]), _REMEDY_OF.get(name, "see its log"))
    except (ValueError, KeyError, TypeError):
        return


_REMEDY_OF = {
    "store": _STORE_RUNBOOK,
    "key_ring": "see docs/runbooks/key-ring-wrong.md",
    "gateway": "see docs/runbooks/gateway-down.md",
    "blobs": "see docs/runbooks/blobs-unavailable.md",
    "prometheus": "start it, or correct PROMETHEUS_URL",
}


def _clock(whose: str, theirs: float | None) -> Iterator[Finding]:
    if theirs is None:
        return
    behind = theirs - time.time()
    if abs(behind) > _CLOCK_SECONDS:
        how = "behind" if behind > 0 else "ahead of"
        difference = f"this machine's clock is {abs(behind):.0f} s {how} that of {whose}"
        yield Finding("clock", "missing", difference, "set both by NTP: timedatectl set-ntp true")


def _seconds(date: str | None) -> float | None:
    try:
        return None if date is None else parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None


def _remedy(message: str) -> str:
    return next((remedy for words, remedy in _REMEDIES.items() if words in message), _STORE_RUNBOOK)
