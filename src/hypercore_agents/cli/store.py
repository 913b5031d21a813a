"""`hypercore-agents store`: moves the store to another machine or state folder."""

from typing import Annotated

import typer

from hypercore_agents.cli.remote import AsJson, say

app = typer.Typer(help="Move the store to another machine or state folder.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Move the store to another machine or state folder."""


@app.command()
def adopt(
    force: Annotated[
        bool, typer.Option("--force", help="Also if agents of the original folder of this copy are running.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make this machine and its STATE_DIR the owner of the store.

    Use it after a move of the platform. Stop all managers first. Agents that ran on the previous machine are marked as
    failed and replaced.
    """
    from hypercore_agents.cli import secret_commands

    before = secret_commands.adopt(force=force)
    summary = "the store belongs to this machine and STATE_DIR" + (f"; previous host: {before}" if before else "")
    say(summary, {"adopted": True, "before": before}, as_json)
