"""What `keys` and `tokens` do to the store and the key file of this machine; imported when such a command runs."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from hypercore_agents.cli.faults import CommandFault
from hypercore_agents.cli.ownership import who_runs
from hypercore_agents.kit.environment import make_state_dir
from hypercore_agents.manager.settings import ManagerSettings
from hypercore_agents.security.bearers import digest, new_bearer
from hypercore_agents.security.sealing import KeyRing, KeyRingFile, Sealer, SealingError
from hypercore_agents.store import agents, bearers, keys
from hypercore_agents.store.database import Database
from hypercore_agents.store.schema import migrate

T = TypeVar("T")


def owner_of(user: str | None) -> str:
    """Return the owner of a user's key; None: the platform."""
    return keys.PLATFORM if user is None else keys.user_owner(user)


def add_key(owner: str, key: str) -> None:
    """Seal and store a key, over the one there was."""

    async def work(database: Database, settings: ManagerSettings) -> None:
        sealed = Sealer(KeyRing.load_or_create(settings.key_path)).seal(key, owner)
        async with database.write() as connection:
            await keys.put_key(connection, owner, sealed, now=time.time())

    _with_store(work)


def remove_key(owner: str) -> bool:
    """Remove a key, also from the store's free pages; False when there was none."""

    async def work(database: Database, _: ManagerSettings) -> bool:
        async with database.write() as connection:
            removed = await keys.delete_key(connection, owner)
        await database.erase_deleted()
        return removed

    return _with_store(work)


def list_keys() -> list[keys.KeyRow]:
    """Return all keys, sealed."""

    async def work(database: Database, _: ManagerSettings) -> list[keys.KeyRow]:
        async with database.read() as connection:
            return await keys.list_keys(connection)

    return _with_store(work)


def rotate() -> int:
    """Make a new key-encryption key and re-wrap everything with it; return how many secrets that were."""

    async def work(database: Database, settings: ManagerSettings) -> int:
        before = KeyRing.load_or_create(settings.key_path)
        ring = before.rotated()
        ring.save(settings.key_path)
        count = await _rewrap_everything(database, settings, ring.primary)
        ring.keeping(before.primary).save(settings.key_path)
        return count

    return _with_store(work)


def prune() -> int:
    """Drop retired key-encryption keys; return how many."""

    async def work(database: Database, settings: ManagerSettings) -> int:
        ring = KeyRing.load_or_create(settings.key_path)
        await _rewrap_everything(database, settings, ring.primary)
        ring.keeping().save(settings.key_path)
        return len(ring.keys) - 1

    return _with_store(work)


def add_token(name: str, scope: str, user: str | None, days: int | None) -> tuple[str, float | None] | None:
    """Make and store a bearer token; return it and when it expires, None when the name is taken."""
    token, now = new_bearer(), time.time()
    row = bearers.BearerRow(digest(token), name, scope, user, now, None if days is None else now + days * 86400)

    async def work(database: Database, _: ManagerSettings) -> bool:
        async with database.write(exclusive="bearers") as connection:
            return await bearers.add_bearer(connection, row)

    return (token, row.expires_at) if _with_store(work) else None


def revoke_token(name: str) -> bool:
    """Delete a token; False when there is none of that name."""

    async def work(database: Database, _: ManagerSettings) -> bool:
        async with database.write() as connection:
            return await bearers.delete_bearer(connection, name)

    return _with_store(work)


def list_tokens() -> list[bearers.BearerRow]:
    """Return all tokens' records."""

    async def work(database: Database, _: ManagerSettings) -> list[bearers.BearerRow]:
        async with database.read() as connection:
            return await bearers.list_bearers(connection)

    return _with_store(work)


def _with_store(work: Callable[[Database, ManagerSettings], Awaitable[T]]) -> T:
    """Run `work` on the store that this machine's settings name."""

    async def run() -> T:
        settings = ManagerSettings()
        _tell_of_a_demo(settings)
        make_state_dir(settings.state_dir)
        database = Database(settings.store_url)
        try:
            await migrate(database)
            return await work(database, settings)
        finally:
            await database.close()

    return asyncio.run(run())


def _tell_of_a_demo(settings: ManagerSettings) -> None:
    """Say so when what runs is a demo, which knows nothing of these keys and tokens.

    Its state is not taken instead: what is stored there goes with it.
    """
    state, demo = settings.state_dir.absolute(), settings.state_dir.absolute() / "demo"
    if settings.database_url is None and who_runs(state) is None and who_runs(demo) is not None:
        sys.stderr.write(
            f"hypercore-agents: a demo is running, with a state of its own; this command works on {state}. "
            f"For the demo: STATE_DIR={demo}\n"
        )


async def _rewrap_everything(database: Database, settings: ManagerSettings, primary: str) -> int:
    sealer = Sealer(KeyRingFile(settings.key_path))
    count = 0
    # Whoever sealed under the old key just before it was replaced commits within moments: look until none is left.
    while left := await _rewrap_all(database, sealer, primary):
        count += left
    await database.erase_deleted()
    return count


async def _rewrap_all(database: Database, sealer: Sealer, primary: str) -> int:
    count = 0
    async with database.write() as connection:
        for key in await keys.list_keys(connection):
            if sealer.key_id(key.sealed) != primary:
                new = _rewrapped(sealer, key.sealed, key.owner)
                count += await keys.replace_sealed(connection, key.owner, key.sealed, new)
        for agent_id, sealed in (await agents.sealed_bearers(connection)).items():
            if sealer.key_id(sealed) != primary:
                new = _rewrapped(sealer, sealed, keys.agent_owner(agent_id))
                count += await agents.replace_bearer(connection, agent_id, sealed, new)
    return count


def _rewrapped(sealer: Sealer, sealed: bytes, owner: str) -> bytes:
    try:
        return sealer.rewrap(sealed, owner)
    except SealingError as error:
        raise CommandFault(f"the secret of {owner} does not open ({error}); remove it, then rotate again") from None
