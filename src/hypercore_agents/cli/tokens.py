"""`hypercore-agents tokens`: bearer tokens of people and programs, for platforms with ENABLE_AUTH."""

from enum import StrEnum
from typing import Annotated

import typer

from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.cli.remote import AsJson, say, show_json, show_table, utc

app = typer.Typer(help="Create, list and revoke bearer tokens.", no_args_is_help=True)


class Scope(StrEnum):
    """What a token gives access to."""

    ADMIN = "admin"
    USER = "user"
    METRICS = "metrics"


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Name of the token, for listing and revoking it.")],
    scope: Annotated[
        Scope, typer.Option(help="admin: everything; user: one user's data; metrics: the routes that Prometheus needs.")
    ],
    user: Annotated[str | None, typer.Option(help="User id, with --scope user.")] = None,
    days: Annotated[
        int | None, typer.Option(min=1, max=3650, help="Days until the token expires; default: never.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create a token and print it once; only its digest is stored."""
    if (scope is Scope.USER) != (user is not None):
        raise CommandError("--user is required with --scope user, and not allowed with other scopes")
    from hypercore_agents.cli import secret_commands

    made = secret_commands.add_token(name, scope.value, user, days)
    if made is None:
        raise CommandError(f"a token named {name!r} exists; revoke it first, or choose another name")
    token, expires = made
    expiry = None if expires is None else utc(expires)
    shown = {"name": name, "scope": scope.value, "user_id": user, "token": token, "expires_at": expiry}
    say(token, shown, as_json)


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="The token's name.")],
    as_json: AsJson = False,
) -> None:
    """Revoke a token. It is refused from then on."""
    from hypercore_agents.cli import secret_commands

    if not secret_commands.revoke_token(name):
        raise CommandError(f"there is no token named {name!r}; list the tokens with: hypercore-agents tokens list")
    say(f"revoked {name}", {"name": name, "revoked": True}, as_json)


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List names, scopes and expiry times; never the tokens."""
    from hypercore_agents.cli import secret_commands

    rows = secret_commands.list_tokens()
    if as_json:
        show_json(
            [
                {"name": row.name, "scope": row.scope, "user_id": row.user_id, "created_at": utc(row.created_at),
                 "expires_at": None if row.expires_at is None else utc(row.expires_at)}
                for row in rows
            ]
        )  # fmt: skip
        return
    shown = [
        (row.name, row.scope, row.user_id or "-", "never" if row.expires_at is None else utc(row.expires_at))
        for row in rows
    ]
    show_table(
        ("NAME", "SCOPE", "USER", "EXPIRES"), shown, empty="no tokens; create one with: hypercore-agents tokens create"
    )
