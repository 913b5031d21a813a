"""What `keys` and `tokens` do to the store and the key file of this machine; imported when such a command runs."""

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
from hypercore_agents.kit.linux.state_location import Origin
from hypercore_agents.manager.sessions.purge import LOOK_SECONDS
from hypercore_agents.manager.settings import ManagerSettings
from hypercore_agents.security.bearers import digest, new_bearer
from hypercore_agents.security.sealing import KeyRingFile, Sealer, SealingError
from hypercore_agents.store import agents, bearers, keys, leases
from hypercore_agents.store.database import Database
from hypercore_agents.store.ownership import (
    KeyRingMismatch,
    claim_origin,
    forget_key_ring,
    open_key_ring,
    rewrap_key_check,
)
from hypercore_agents.store.schema import migrate
from hypercore_agents.store.signing import forget_signing, note_signing, signed_until

T = TypeVar("T")


def owner_of(user: str | None) -> str:
    """Return the owner of a user's key; None: the platform."""
    return keys.PLATFORM if user is None else keys.user_owner(user)


def add_key(owner: str, key: str) -> None:
    """Seal and store a key, over the one there was."""

    async def work(database: Database, settings: ManagerSettings) -> None:
        sealed = Sealer(await open_key_ring(database, settings.key_path)).seal(key, owner)
        async with database.write() as connection:
            await keys.put_key(connection, owner, sealed, now=time.time())

    _with_store(work)


def remove_key(owner: str) -> tuple[bool, bool]:
    """Remove a key; return whether there was one, and whether it is also erased from the store's log."""

    async def work(database: Database, _: ManagerSettings) -> tuple[bool, bool]:
        async with database.write() as connection:
            removed = await keys.delete_key(connection, owner)
        return removed, await _erase(database)

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
    """Drop retired key-encryption keys; return how many.

    Raises CommandFault while a token that one of them signed may be alive, unless `force` is set.
    """

    async def work(database: Database, settings: ManagerSettings) -> int:
        ring = await open_key_ring(database, settings.key_path)
        retired = [key_id for key_id in ring.keys if key_id != ring.primary]
        async with database.read() as connection:
            noted = await signed_until(connection)
        # Of a key that was retired by an earlier release nothing is noted but when its ring was replaced.
        replaced = settings.key_path.stat().st_mtime + _token_seconds()
        until = max((noted.get(key_id, replaced) for key_id in retired), default=0.0)
        if until > time.time() and not force:
            raise CommandError(
                f"tokens that a retired key signed may be valid until {utc(until)}: run it then. With --force they are "
                "void now: every turn fails until the manager has replaced all agents (HEALTH_CHECK_INTERVAL)"
            )
        await _rewrap_everything(database, settings, ring.primary)
        ring.keeping().save(settings.key_path)
        async with database.write() as connection:
            await forget_signing(connection, retired)
        return len(retired)

    return _with_store(work)


def reset() -> int:
    """Delete all sealed secrets and have the next role that starts make a new key ring; return how many there were.

    Live agents are stopped, since nothing opens their bearers any more. Raises CommandFault while the ring opens them.
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
    """Make this machine and STATE_DIR those that the store belongs to; return the host that it belonged to before.

    Raises CommandFault while a manager runs on the store, and unless `force` is set while agents of a copied or moved
    state folder run.
    """

    async def work(database: Database, settings: ManagerSettings) -> str | None:
        async with database.read() as connection:
            managed = await leases.any_lives(connection, now=time.time())
        if managed:
            raise CommandError("a manager runs on this store; stop it, wait 15 s, and run this again")
        alive = running_below(settings.state_dir)
        if alive and not force:
            raise CommandError(
                f"{len(alive)} agents that this state folder names still run, as in the folder that it was copied or "
                f"moved from (process {alive[0]}): stop them there with STOP_AGENTS_ON_EXIT=true, or leave them to "
                "that folder with --force"
            )
        before = await claim_origin(database, Origin.of(settings.state_dir), take_over=True)
        return None if before is None else before.name

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


def _token_seconds() -> float:
    settings = GatewaySettings()
    return max(settings.agent_token_seconds, settings.session_token_seconds)


async def _rewrap_everything(database: Database, settings: ManagerSettings, primary: str) -> int:
    sealer = Sealer(KeyRingFile(settings.key_path))
    count = 0
    # Whoever sealed under the old key just before it was replaced commits within moments: look until none is left.
    while left := await _rewrap_all(database, sealer, primary):
        count += left
    await _erase(database)
    return count


async def _erase(database: Database) -> bool:
    """Erase what was deleted from the store's log too; say so where that could not be done."""
    erased = await database.erase_deleted()
    if not erased:
        sys.stderr.write(
            "hypercore-agents: other processes are reading the store, so that what was deleted may still be readable "
            f"in its log; a running manager erases it within {LOOK_SECONDS:.0f} s, or stop everything and run this "
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
        raise CommandError(f"the secret of {owner} does not open ({error}); remove it, then rotate again") from None
