"""Ties a store to one key ring and one machine.

A role does not start with another key ring, nor, with a local backend, on another machine or state folder; the error
says what to copy or set. Otherwise a second machine would seal secrets that the first one cannot open, and its leader
would fail the first one's agents.

- Key ring: the store has a constant sealed under it. The first role that opens the store creates the ring in the
  transaction that writes the constant. A store of an earlier release accepts the ring that opens one of its secrets.
- Machine: the store has the `StateLocation` of the first manager with a local backend.

Rejected: an owner per agent, so that each machine runs its own agents (the pool's size, placement and the relay assume
that the leader reaches every agent); a fingerprint of the key ring (it changes with every rotation).
"""

import base64
import socket
import time
from dataclasses import asdict
from pathlib import Path

from hypercore_agents.kit.environment import SettingError
from hypercore_agents.kit.linux.state_location import StateLocation
from hypercore_agents.security.sealing import KeyRing, Sealer, SealingError
from hypercore_agents.store import agents, installation, keys
from hypercore_agents.store.database import Connection, Database

KEY_RING, ORIGIN = "key_ring", "origin"
_LOCK = "installation"
_OWNER, _CONSTANT = "store", "hypercore-agents"


class KeyRingMismatch(SealingError):
    """This store's secrets are sealed under another key ring; the message says what to do."""


class ForeignStore(SettingError):
    """The store belongs to another machine or state folder; the message says what to do."""


async def open_key_ring(database: Database, path: Path) -> KeyRing:
    """Return the store's key ring from its file; create the file if the store has no ring yet.

    Raises KeyRingMismatch if the store has another ring, SealingError if the file cannot be used.
    """
    async with database.write(exclusive=_LOCK) as connection:
        note = await installation.get_note(connection, KEY_RING)
        found = _load(path)
        if found is not None and note is not None and _opens(found, note["sealed"]):
            return found
        secrets = await _secrets(connection)
        if (note is not None or secrets) and (found is None or not _opens_any(found, secrets)):
            raise _mismatch(path, note)
        ring = found or KeyRing.load_or_create(path)
        await _note_ring(connection, ring, path)
        return ring


async def require_key_ring(url: str, path: Path) -> None:
    """Do as `open_key_ring`, before anything else uses the store."""
    database = Database(url)
    try:
        await open_key_ring(database, path)
    finally:
        await database.close()


async def check_key_ring(database: Database, ring: KeyRing) -> None:
    """Raise KeyRingMismatch if this ring is not the store's, Unavailable if the store does not answer."""
    async with database.read() as connection:
        note = await installation.get_note(connection, KEY_RING)
    if note is not None and not _opens(ring, note["sealed"]):
        raise KeyRingMismatch(
            "the key ring is not this store's: copy the key file of the machine that rotated its keys"
        )


async def key_ring_fault(database: Database, path: Path) -> str | None:
    """Return why the key ring in a file is not the store's; None if it is, or if the store has none yet.

    Changes nothing. Raises SealingError if the file cannot be used.
    """
    async with database.read() as connection:
        note = await installation.get_note(connection, KEY_RING)
    found = _load(path)
    if note is None or (found is not None and _opens(found, note["sealed"])):
        return None
    return str(_mismatch(path, note))


async def rewrap_key_check(connection: Connection, sealer: Sealer) -> None:
    """Seal the store's constant under the ring's new primary key."""
    note = await installation.get_note(connection, KEY_RING)
    if note is not None:
        sealed = base64.b64encode(sealer.seal(_CONSTANT, _OWNER)).decode()
        await installation.replace_note(connection, KEY_RING, {**note, "sealed": sealed}, now=time.time())


async def forget_key_ring(connection: Connection) -> None:
    """Remove the key ring's note, so that the next role to start creates or brings a new ring."""
    await installation.delete_note(connection, KEY_RING)


async def claim_state_location(
    database: Database, here: StateLocation, *, take_over: bool = False
) -> StateLocation | None:
    """Record where the store's agents run; return the previous origin.

    Raises ForeignStore if that is another place, unless `take_over` is set.
    """
    async with database.write(exclusive=_LOCK) as connection:
        note = await installation.get_note(connection, ORIGIN)
        before = None if note is None else StateLocation(**note)
        difference = None if before is None else here.difference_from(before)
        if before is not None and difference is not None and not take_over:
            raise ForeignStore(_foreign(before, here, difference))
        if before is None or difference is not None:
            await installation.put_note(connection, ORIGIN, asdict(here), now=time.time())
        return before


async def stored_state_location(database: Database) -> StateLocation | None:
    """Return where the store's agents run, None if no manager with a local backend has used the store."""
    async with database.read() as connection:
        note = await installation.get_note(connection, ORIGIN)
    return None if note is None else StateLocation(**note)


def _load(path: Path) -> KeyRing | None:
    return KeyRing.load(path) if path.exists() else None


def _opens(ring: KeyRing, sealed: str) -> bool:
    try:
        return Sealer(ring).open(base64.b64decode(sealed), _OWNER) == _CONSTANT
    except SealingError:
        return False


async def _secrets(connection: Connection) -> list[bytes]:
    stored = [key.sealed for key in await keys.list_keys(connection)]
    return [*stored, *(await agents.sealed_bearers(connection)).values()]


def _opens_any(ring: KeyRing, secrets: list[bytes]) -> bool:
    sealer = Sealer(ring)
    return any(sealer.key_id(sealed) in ring.keys for sealed in secrets)


async def _note_ring(connection: Connection, ring: KeyRing, path: Path) -> None:
    sealed = base64.b64encode(Sealer(ring).seal(_CONSTANT, _OWNER)).decode()
    note = {"sealed": sealed, "host": socket.gethostname(), "path": str(path)}
    await installation.put_note(connection, KEY_RING, note, now=time.time())


def _mismatch(path: Path, note: dict[str, str] | None) -> KeyRingMismatch:
    first = "" if note is None else f", first used on {note['host']} as {note['path']}"
    found = f"the key ring in {path} is not this store's" if path.exists() else f"there is no key ring in {path}"
    return KeyRingMismatch(
        f"KEY_FILE: {found}, and the secrets in the store are sealed under another one{first}. Copy that file here "
        "(mode 600) or set KEY_FILE to it; or set DATABASE_URL to a store of its own. If it is lost: "
        "hypercore-agents keys reset"
    )


def _foreign(before: StateLocation, here: StateLocation, difference: str) -> str:
    where = {
        "host": f"host {before.name} (STATE_DIR={before.folder}), and this is host {here.name}"
        + (", another machine of that name" if here.name == before.name else ""),
        "folder": f"STATE_DIR={before.folder} on this host, and here STATE_DIR is {here.folder}",
        "folder_id": f"another folder {before.folder} (on host {before.name}): this one is new, or this machine is a "
        "clone of that one",
    }[difference]
    same = "use that STATE_DIR" if difference == "folder" else "run further managers there, with that STATE_DIR"
    return (
        f"the store belongs to {where}. COMPUTE_BACKEND process and microvm run agents on one machine, under one "
        f"STATE_DIR: {same}; or set DATABASE_URL to a store of its own. To move the platform here, stop it there and "
        "run: hypercore-agents store adopt"
    )
