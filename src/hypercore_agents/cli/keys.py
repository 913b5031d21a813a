"""`hypercore-agents keys`: the sealed Claude API keys, on the machine that holds the store and the key file.

A key is read from standard input or a prompt, never from an argument: arguments are seen by every process.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer

from hypercore_agents.cli.faults import CommandFault
from hypercore_agents.manager.settings import ManagerSettings
from hypercore_agents.security.sealing import KeyRing, KeyRingFile, Sealer, SealingError
from hypercore_agents.store import agents, keys
from hypercore_agents.store.database import Database
from hypercore_agents.store.schema import migrate

app = typer.Typer(help="Store, list, remove and re-wrap Claude API keys.", no_args_is_help=True)
T = TypeVar("T")


def _owner(user: str | None, platform: bool) -> str:
    if platform == (user is not None):
        raise CommandFault("say whose key: a user's id, or --platform")
    return keys.PLATFORM if user is None else keys.user_owner(user)


def with_store(work: Callable[[Database, ManagerSettings], Awaitable[T]]) -> T:
    """Run `work` on the store that this machine's settings name."""

    async def run() -> T:
        settings = ManagerSettings()
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        database = Database(settings.store_url)
        try:
            await migrate(database)
            return await work(database, settings)
        finally:
            await database.close()

    return asyncio.run(run())


_User = Annotated[str | None, typer.Argument(metavar="[USER]", help="A user's id.")]
_Platform = Annotated[bool, typer.Option("--platform", help="The platform's own key.")]


@app.command()
def add(user: _User = None, platform: _Platform = False) -> None:
    """Seal and store a key, over the one there was; the key is read from standard input."""
    owner = _owner(user, platform)
    given = typer.prompt("Claude API key", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline()
    key = given.strip()
    if not 8 <= len(key) <= 512 or not key.isascii() or not key.isprintable() or " " in key:
        raise CommandFault("the key must be 8 to 512 printable ASCII characters without spaces")

    async def work(database: Database, settings: ManagerSettings) -> None:
        sealed = Sealer(KeyRing.load_or_create(settings.key_path)).seal(key, owner)
        async with database.write() as connection:
            await keys.put_key(connection, owner, sealed, now=time.time())

    with_store(work)
    typer.echo(f"stored the key of {owner}")


@app.command()
def remove(user: _User = None, platform: _Platform = False) -> None:
    """Remove a stored key; requests that need it are refused from then on."""
    owner = _owner(user, platform)

    async def work(database: Database, _: ManagerSettings) -> bool:
        async with database.write() as connection:
            removed = await keys.delete_key(connection, owner)
        await database.erase_deleted()
        return removed

    if not with_store(work):
        raise CommandFault(f"there is no key of {owner}")
    typer.echo(f"removed the key of {owner}")


@app.command("list")
def list_() -> None:
    """Show whose keys are stored and since when; never the keys."""

    async def work(database: Database, _: ManagerSettings) -> list[keys.KeyRow]:
        async with database.read() as connection:
            return await keys.list_keys(connection)

    for row in with_store(work):
        typer.echo(f"{row.owner}\t{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(row.created_at))}")


@app.command()
def rotate() -> None:
    """Make a new key-encryption key and re-wrap everything with it; running processes follow by themselves.

    The key before it stays in the key file for the tokens that it signed; `keys prune` drops it later.
    """
    count = with_store(_rotate)
    typer.echo(f"re-wrapped {count} secrets under a new key-encryption key")
    typer.echo(
        "the one before it still checks tokens: in an hour (SESSION_TOKEN_SECONDS), run: hypercore-agents keys prune"
    )


@app.command()
def prune() -> None:
    """Drop retired key-encryption keys; tokens that they signed are void from then on."""

    async def work(database: Database, settings: ManagerSettings) -> int:
        ring = KeyRing.load_or_create(settings.key_path)
        await _rewrap_everything(database, settings, ring.primary)
        ring.keeping().save(settings.key_path)
        return len(ring.keys) - 1

    typer.echo(f"dropped {with_store(work)} retired keys")


async def _rotate(database: Database, settings: ManagerSettings) -> int:
    before = KeyRing.load_or_create(settings.key_path)
    ring = before.rotated()
    ring.save(settings.key_path)
    count = await _rewrap_everything(database, settings, ring.primary)
    ring.keeping(before.primary).save(settings.key_path)
    return count


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
