"""`hypercore-agents keys`: sealed Claude API keys, on the machine that holds the store and the key file.

A key is read from standard input or a prompt, never from an argument: every process can read arguments.
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
    """Seal and store a key, replacing an existing one.

    Reads the key from standard input.
    """
    _require_one_owner(user, platform)
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

    Requests that need the key are refused afterwards.
    """
    _require_one_owner(user, platform)
    from hypercore_agents.cli import secret_commands

    owner = secret_commands.owner_of(user)
    removed, erased = secret_commands.remove_key(owner)
    if not removed:
        raise CommandError(f"there is no key of {owner}; list the stored keys with: hypercore-agents keys list")
    say(f"removed the key of {owner}", {"owner": owner, "removed": True, "erased": erased}, as_json)


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the owners of stored keys; never the keys."""
    from hypercore_agents.cli import secret_commands

    rows = secret_commands.list_keys()
    if as_json:
        show_json([{"owner": row.owner, "created_at": utc(row.created_at)} for row in rows])
        return
    shown = [(row.owner, utc(row.created_at)) for row in rows]
    show_table(("OWNER", "SINCE"), shown, empty="no keys; store one with: hypercore-agents keys add USER")


@app.command()
def rotate(as_json: AsJson = False) -> None:
    """Create a new key-encryption key and re-wrap all secrets with it.

    Running processes load the new key automatically. The previous key remains in the key file to verify the tokens
    that it signed; `keys prune` removes it later.
    """
    from hypercore_agents.cli import secret_commands

    count = secret_commands.rotate()
    say(
        f"re-wrapped {count} secrets under a new key-encryption key\n"
        "the previous key still verifies tokens: after they expire (SESSION_TOKEN_SECONDS, an hour by default), "
        "run: hypercore-agents keys prune",
        {"rewrapped": count},
        as_json,
    )


@app.command()
def prune(
    force: Annotated[bool, typer.Option("--force", help="Also invalidate tokens that have not expired.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete retired key-encryption keys.

    Refused while a token that such a key signed may still be valid. With --force, agents and sessions with such tokens
    fail until the manager has replaced the agents.
    """
    from hypercore_agents.cli import secret_commands

    count = secret_commands.prune(force=force)
    say(f"deleted {count} retired keys", {"dropped": count}, as_json)


@app.command()
def reset(as_json: AsJson = False) -> None:
    """Recover from a lost key ring.

    Deletes all stored Claude API keys, which cannot be decrypted without the key ring, and stops all agents. Refused
    while the key ring exists.
    """
    from hypercore_agents.cli import secret_commands

    count = secret_commands.reset()
    say(
        f"deleted {count} keys that cannot be decrypted; the next role that starts creates a new key ring",
        {"deleted": count},
        as_json,
    )


def _require_one_owner(user: str | None, platform: bool) -> None:
    if platform == (user is not None):
        raise CommandError("name the owner of the key: a user id, or --platform")
