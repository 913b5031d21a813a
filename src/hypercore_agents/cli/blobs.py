"""`hypercore-agents blobs`: moving archived workspaces from one blob store to another."""

from typing import Annotated

import typer

from hypercore_agents.cli.remote import REFUSED, AsJson, say

app = typer.Typer(help="Move archived workspaces.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Move archived workspaces."""


@app.command()
def move(
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="URL", help="Where they are now.  [the folder in STATE_DIR]"),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete each archive from there once it is copied.")] = False,
    as_json: AsJson = False,
) -> None:
    """Copy all archived workspaces to BLOB_URL.

    Set BLOB_URL for all roles first, then run this; it may run again, and copies what is not there yet. Exit code 1
    when archives are in neither store.
    """
    from hypercore_agents.cli import blob_move

    moved = blob_move.move(source, delete=delete)
    told = f"copied {moved.copied} archives, {moved.present} were there already"
    if moved.missing:
        told += f"; {len(moved.missing)} are in neither store, the first of session {moved.missing[0]}"
    say(
        told,
        {"copied": moved.copied, "present": moved.present, "missing_sessions": moved.missing},
        as_json,
    )
    if moved.missing:
        raise SystemExit(REFUSED)
