"""`hypercore-agents blobs`: move archived workspaces from one blob store to another."""

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
        typer.Option("--from", metavar="URL", help="The current blob store.  [the folder in STATE_DIR]"),
    ] = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete each archive from the source after it is copied.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy all archived workspaces to BLOB_URL.

    Set BLOB_URL for all roles first, then run this command. It can run again: it copies only missing archives. Exits
    with code 1 if archives are in neither store.
    """
    from hypercore_agents.cli import blob_move

    moved = blob_move.move(source, delete=delete)
    summary = f"copied {moved.copied} archives, {moved.present} were there already"
    if moved.missing:
        summary += f"; {len(moved.missing)} are in neither store, the first of session {moved.missing[0]}"
    say(
        summary,
        {"copied": moved.copied, "present": moved.present, "missing_sessions": moved.missing},
        as_json,
    )
    if moved.missing:
        raise SystemExit(REFUSED)
