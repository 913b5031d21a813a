"""`hypercore-agents keys`: the sealed Claude API keys, on the machine that holds the store and the key file.

A key is read from standard input or a prompt, never from an argument: arguments are seen by every process.
"""

import sys
from typing import Annotated

import typer

from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.cli.remote import AsJson, say, show_json, show_table, utc

app = typer.Typer(help="Store, list, remove and re-wrap Claude API keys.", no_args_is_help=True)
_User = Annotated[str | None, typer.Argument(metavar="[USER]", help="A user's id.")]
_Platform = Annotated[bool, typer.Option("--platform", help="The platform's own key.")]


@app.command()
def add(user: _User = None, platform: _Platform = False, as_json: AsJson = False) -> None:
    """Seal and store a key, over the one there was.

    The key is read from standard input.
    """
    _named(user, platform)
    given = typer.prompt("Claude API key", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()
    key = given.strip()
    if not 8 <= len(key) <= 512 or not key.isascii() or not key.isprintable() or " " in key:
        raise CommandError("the key must be 8 to 512 printable ASCII characters without spaces")
    from hypercore_agents.cli import secret_commands

    owner = secret_commands.owner_of(user)
    secret_commands.add_key(owner, key)
    say(f"stored the key of {owner}", {"owner": owner, "stored": True}, as_json)


@app.command()
def remove(user: _User = None, platform: _Platform = False, as_json: AsJson = False) -> None:
    """Remove a stored key.

    Requests that need it are refused from then on.
    """
    _named(user, platform)
    from hypercore_agents.cli import secret_commands

    owner = secret_commands.owner_of(user)
    removed, erased = secret_commands.remove_key(owner)
    if not removed:
        raise CommandError(f"there is no key of {owner}; see whose there are: hypercore-agents keys list")
    say(f"removed the key of {owner}", {"owner": owner, "removed": True, "erased": erased}, as_json)


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """Show whose keys are stored and since when; never the keys."""
    from hypercore_agents.cli import secret_commands

    rows = secret_commands.list_keys()
    if as_json:
        show_json([{"owner": row.owner, "created_at": utc(row.created_at)} for row in rows])
        return
    shown = [(row.owner, utc(row.created_at)) for row in rows]
    show_table(("OWNER", "SINCE"), shown, empty="no keys; store one with: hypercore-agents keys add USER")


@app.command()
def rotate(as_json: AsJson = False) -> None:
    """Make a new key-encryption key and re-wrap all with it.

    Running processes follow by themselves. The key before it stays in the key file for the tokens that it signed;
    `keys prune` drops it later.
    """
    from hypercore_agents.cli import secret_commands

    count = secret_commands.rotate()
    say(
        f"re-wrapped {count} secrets under a new key-encryption key\n"
        "the one before it still checks tokens: once they have expired (SESSION_TOKEN_SECONDS, an hour by default), "
        "run: hypercore-agents keys prune",
        {"rewrapped": count},
        as_json,
    )


@app.command()
def prune(
    force: Annotated[bool, typer.Option("--force", help="Also void tokens that are still valid.")] = False,
    as_json: AsJson = False,
) -> None:
    """Drop retired key-encryption keys.

    Refused while a token that one of them signed may be valid. With --force, agents and sessions with such tokens fail
    until the manager has replaced the agents.
    """
    from hypercore_agents.cli import secret_commands

    count = secret_commands.prune(force=force)
    say(f"dropped {count} retired keys", {"dropped": count}, as_json)


@app.command()
def reset(as_json: AsJson = False) -> None:
    """Start over after the key ring was lost.

    Deletes all stored Claude API keys, which nothing can open any more, and stops all agents. Refused while the key
    ring is there.
    """
    from hypercore_agents.cli import secret_commands

    count = secret_commands.reset()
    say(
        f"deleted {count} keys that nothing can open; the next role that starts makes a new key ring",
        {"deleted": count},
        as_json,
    )


def _named(user: str | None, platform: bool) -> None:
    if platform == (user is not None):
        raise CommandError("say whose key: a user's id, or --platform")
