"""Implementation of `keys`, `tokens` and `store`: changes of the store and the key file of this machine.

The commands import this module when they run, so that `--help` stays fast.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.cli.ownership import running_below, who_runs
from hypercore_agents.cli.remote import utc
from hypercore_agents.gateway.settings import GatewaySettings
from hypercore_agents.kit.environment import make_state_dir
from hypercore_agents.kit.linux.state_location import StateLocation
from hypercore_agents.manager.sessions.purge import INTERVAL_SECONDS as PURGE_SECONDS
from hypercore_agents.manager.settings import ManagerSettings
from hypercore_agents.security.bearers import digest, new_bearer
from hypercore_agents.security.sealing import KeyRingFile, Sealer, SealingError
from hypercore_agents.store import agents, bearers, keys, leases
from hypercore_agents.store.database import Database
from hypercore_agents.store.ownership import (
    KeyRingMismatch,
    claim_state_location,
    forget_key_ring,
    open_key_ring,
    rewrap_key_check,
)
from hypercore_agents.store.schema import migrate
from hypercore_agents.store.signing import forget_signing, note_signing, signed_until

T = TypeVar("T")


def owner_of(user: str | None) -> str:
    """Return the owner id of a user's key, or of the platform's key for None."""
    return keys.PLATFORM if user is None else keys.user_owner(user)


def add_key(owner: str, key: str) -> None:
    """Seal and store a key, replacing an existing one."""

    async def work(database: Database, settings: ManagerSettings) -> None:
        sealed = Sealer(await open_key_ring(database, settings.key_path)).seal(key, owner)
        async with database.write() as connection:
            await keys.put_key(connection, owner, sealed, now=time.time())

    _with_store(work)


def remove_key(owner: str) -> tuple[bool, bool]:
    """Remove a key; return whether it existed, and whether it is also erased from the store's log."""

    async def work(database: Database, _: ManagerSettings) -> tuple[bool, bool]:
        async with database.write() as connection:
            removed = await keys.delete_key(connection, owner)
        return removed, await _erase(database)

    return _with_store(work)


def list_keys() -> list[keys.KeyRow]:
    """Return all sealed keys."""

    async def work(database: Database, _: ManagerSettings) -> list[keys.KeyRow]:
        async with database.read() as connection:
            return await keys.list_keys(connection)

    return _with_store(work)


def rotate() -> int:
    """Create a new key-encryption key, re-wrap all secrets with it, and return their number."""

    async def work(database: Database, settings: ManagerSettings) -> int:
        before = await open_key_ring(database, settings.key_path)
        ring = before.rotated()
        now, lifetime = time.time(), _token_seconds()
        async with database.write(exclusive="signing") as connection:
            await note_signing(connection, before.primary, until=now + lifetime, now=now)
        ring.save(settings.key_path)
        count = await _rewrap_everything(database, settings, ring.primary)
        ring.keeping(before.primary).save(settings.key_path)
        return count

    return _with_store(work)


def prune(*, force: bool) -> int:
    """Delete retired key-encryption keys and return their number.

    Raises CommandError while a token that one of them signed may be valid, unless `force` is set.
    """

    async def work(database: Database, settings: ManagerSettings) -> int:
        ring = await open_key_ring(database, settings.key_path)
        retired = [key_id for key_id in ring.keys if key_id != ring.primary]
        async with database.read() as connection:
            noted = await signed_until(connection)
        # For a key that an earlier release retired, only the replacement time of its ring is known.
        replaced = settings.key_path.stat().st_mtime + _token_seconds()
        until = max((noted.get(key_id, replaced) for key_id in retired), default=0.0)
        if until > time.time() and not force:
            raise CommandError(
                f"tokens signed by a retired key may be valid until {utc(until)}: run the command then. "
                "--force invalidates them now: every turn fails until the manager has replaced all agents "
                "(HEALTH_CHECK_INTERVAL)"
            )
        await _rewrap_everything(database, settings, ring.primary)
        ring.keeping().save(settings.key_path)
        async with database.write() as connection:
            await forget_signing(connection, retired)
        return len(retired)

    return _with_store(work)


def reset() -> int:
    """Delete all sealed secrets, and return their number. The next role that starts creates a new key ring.

    Stops live agents, because their bearers cannot be decrypted. Raises CommandError while the key ring decrypts them.
    """

    async def work(database: Database, settings: ManagerSettings) -> int:
        try:
            await open_key_ring(database, settings.key_path)
        except KeyRingMismatch:
            pass
        else:
            raise CommandError(f"the key ring in {settings.key_path} is this store's; nothing was deleted")
        now = time.time()
        async with database.write() as connection:
            stored = await keys.list_keys(connection)
            for key in stored:
                await keys.delete_key(connection, key.owner)
            for agent in await agents.list_agents(connection):
                await agents.want_stopped(connection, agent.agent_id, now=now)
            await forget_key_ring(connection)
            await agents.forget_bearers(connection)
        await _erase(database)
        return len(stored)

    return _with_store(work)


def adopt(*, force: bool) -> str | None:
    """Make this machine and STATE_DIR the owner of the store; return the previous host.

    Raises CommandError while a manager runs on the store, and, without `force`, while agents of a copied or moved state
    folder run.
    """

    async def work(database: Database, settings: ManagerSettings) -> str | None:
        async with database.read() as connection:
            managed = await leases.any_lives(connection, now=time.time())
        if managed:
            raise CommandError("a manager is running on this store; stop it, wait 15 s, and run the command again")
        alive = running_below(settings.state_dir)
        if alive and not force:
            raise CommandError(
                f"{len(alive)} agents of this state folder, or of the folder that it was copied from, still run "
                f"(process {alive[0]}): stop them there with STOP_AGENTS_ON_EXIT=true, or use --force to leave them "
                "to that folder"
            )
        before = await claim_state_location(database, StateLocation.of(settings.state_dir), take_over=True)
        return None if before is None else before.name

    return _with_store(work)


def add_token(name: str, scope: str, user: str | None, days: int | None) -> tuple[str, float | None] | None:
    """Create and store a bearer token; return it and its expiry, None if the name is taken."""
    token, now = new_bearer(), time.time()
    row = bearers.BearerRow(digest(token), name, scope, user, now, None if days is None else now + days * 86400)

    async def work(database: Database, _: ManagerSettings) -> bool:
        async with database.write(exclusive="bearers") as connection:
            return await bearers.add_bearer(connection, row)

    return (token, row.expires_at) if _with_store(work) else None


def revoke_token(name: str) -> bool:
    """Delete a token; return whether it existed."""

    async def work(database: Database, _: ManagerSettings) -> bool:
        async with database.write() as connection:
            return await bearers.delete_bearer(connection, name)

    return _with_store(work)


def list_tokens() -> list[bearers.BearerRow]:
    """Return the records of all tokens."""

    async def work(database: Database, _: ManagerSettings) -> list[bearers.BearerRow]:
        async with database.read() as connection:
            return await bearers.list_bearers(connection)

    return _with_store(work)


def _with_store(work: Callable[[Database, ManagerSettings], Awaitable[T]]) -> T:
    """Run `work` on the store of this machine's settings."""

    async def run() -> T:
        settings = ManagerSettings()
        _warn_about_demo(settings)
        make_state_dir(settings.state_dir)
        database = Database(settings.store_url)
        try:
            await migrate(database)
            return await work(database, settings)
        finally:
            await database.close()

    return asyncio.run(run())


def _warn_about_demo(settings: ManagerSettings) -> None:
    """Warn if only a demo is running, whose state does not include these keys and tokens.

    Its state is not used instead, because the demo deletes it when it stops.
    """
    state, demo = settings.state_dir.absolute(), settings.state_dir.absolute() / "demo"
    if settings.database_url is None and who_runs(state) is None and who_runs(demo) is not None:
        sys.stderr.write(
            f"hypercore-agents: a demo is running with its own state; this command uses {state}. "
            f"To use the demo's state, set STATE_DIR={demo}\n"
        )


def _token_seconds() -> float:
    settings = GatewaySettings()
    return max(settings.agent_token_seconds, settings.session_token_seconds)


async def _rewrap_everything(database: Database, settings: ManagerSettings, primary: str) -> int:
    sealer = Sealer(KeyRingFile(settings.key_path))
    count = 0
    # A process may still commit a secret that it sealed under the old key: repeat until none is left.
    while left := await _rewrap_all(database, sealer, primary):
        count += left
    await _erase(database)
    return count


async def _erase(database: Database) -> bool:
    """Erase deleted rows from the store's log as well; warn if that is not possible now."""
    erased = await database.erase_deleted()
    if not erased:
        sys.stderr.write(
            "hypercore-agents: other processes are reading the store, so deleted data may still be in its log; "
            f"a running manager erases it within {PURGE_SECONDS:.0f} s; otherwise stop everything and run the command "
            "again\n"
        )
    return erased


async def _rewrap_all(database: Database, sealer: Sealer, primary: str) -> int:
    count = 0
    async with database.write() as connection:
        await rewrap_key_check(connection, sealer)
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
        raise CommandError(f"cannot decrypt the secret of {owner} ({error}); remove it, then rotate again") from None
