"""`hypercore-agents tokens`: the bearer tokens with which people and programs enter when ENABLE_AUTH is on."""

import time
from enum import StrEnum
from typing import Annotated

import typer

from hypercore_agents.cli.faults import CommandFault
from hypercore_agents.cli.keys import with_store
from hypercore_agents.manager.settings import ManagerSettings
from hypercore_agents.security.bearers import digest, new_bearer
from hypercore_agents.store import bearers
from hypercore_agents.store.database import Database

app = typer.Typer(help="Make, list and revoke bearer tokens.", no_args_is_help=True)


class Scope(StrEnum):
    """How far a token reaches."""

    ADMIN = "admin"
    USER = "user"
    METRICS = "metrics"


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What you will call the token when you revoke it.")],
    scope: Annotated[Scope, typer.Option(help="admin: all; user: one user's things; metrics: what Prometheus needs.")],
    user: Annotated[str | None, typer.Option(help="The user's id, with --scope user.")] = None,
    days: Annotated[int | None, typer.Option(min=1, max=3650, help="Expires after so many days.")] = None,
) -> None:
    """Make a token and print it once; only its digest is stored."""
    if (scope is Scope.USER) != (user is not None):
        raise CommandFault("--user goes with --scope user, and only with it")
    token, now = new_bearer(), time.time()
    row = bearers.BearerRow(digest(token), name, scope.value, user, now, None if days is None else now + days * 86400)

    async def work(database: Database, _: ManagerSettings) -> bool:
        async with database.write(exclusive="bearers") as connection:
            return await bearers.add_bearer(connection, row)

    if not with_store(work):
        raise CommandFault(f"there is a token named {name!r}; revoke it first, or choose another name")
    typer.echo(token)


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="The token's name.")]) -> None:
    """Revoke a token; it opens nothing from then on."""

    async def work(database: Database, _: ManagerSettings) -> bool:
        async with database.write() as connection:
            return await bearers.delete_bearer(connection, name)

    if not with_store(work):
        raise CommandFault(f"there is no token named {name!r}")
    typer.echo(f"revoked {name}")


@app.command("list")
def list_() -> None:
    """Show names, scopes and ages; never the tokens."""

    async def work(database: Database, _: ManagerSettings) -> list[bearers.BearerRow]:
        async with database.read() as connection:
            return await bearers.list_bearers(connection)

    for row in with_store(work):
        expiry = "never" if row.expires_at is None else time.strftime("%Y-%m-%d", time.gmtime(row.expires_at))
        typer.echo(f"{row.name}\t{row.scope}\t{row.user_id or '-'}\texpires {expiry}")
