"""`hypercore-agents store`: what an operator does to the store itself."""

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
        bool, typer.Option("--force", help="Also when agents of the folder that this one was copied from run.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make this machine and its STATE_DIR those that the store belongs to.

    For a platform that moved. Stop all managers first; agents that ran elsewhere are marked as failed and replaced.
    """
    from hypercore_agents.cli import secret_commands

    before = secret_commands.adopt(force=force)
    told = "the store belongs to this machine and STATE_DIR" + (f"; before, to host {before}" if before else "")
    say(told, {"adopted": True, "before": before}, as_json)
