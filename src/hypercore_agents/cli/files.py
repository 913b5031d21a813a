"""`hypercore-agents files`: files of a session's workspace, over the manager's HTTP API."""

import base64
import sys
from pathlib import Path
from typing import Annotated

import typer

from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.cli.remote import AsJson, Url, manager, printable, say, show_json, show_table, utc

app = typer.Typer(help="List, get, put and delete files of a session.", no_args_is_help=True)
_SessionId = Annotated[str, typer.Argument(metavar="SESSION_ID")]
_Path = Annotated[
    str, typer.Argument(metavar="PATH", help="Path relative to the workspace, as `files list` prints it.")
]


@app.command("list")
def list_(
    session_id: _SessionId,
    after: Annotated[str | None, typer.Option(help="Value of `next` in the previous page.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List one page of files, ordered by path."""
    with manager(url) as client:
        page = client.files(session_id, after=after)
    if as_json:
        show_json(page)
        return
    rows = [(entry.type, entry.size, utc(entry.modified_at), printable(entry.path)) for entry in page.files]
    show_table(("TYPE", "BYTES", "CHANGED", "PATH"), rows, empty="no files")
    if page.next is not None:
        sys.stdout.write(f"\n(more: --after {printable(page.next)})\n")


@app.command()
def get(
    session_id: _SessionId,
    path: _Path,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file instead of standard output.")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Print a file. With --json and without --output, the content is base64."""
    with manager(url) as client:
        content = client.read_file(session_id, path)
    try:
        if output is not None:
            output.write_bytes(content)
        elif not as_json:
            sys.stdout.buffer.write(content)
    except OSError as error:
        raise CommandError(f"{output or 'standard output'} cannot be written: {error.strerror}") from None
    if as_json:
        encoded = base64.b64encode(content).decode() if output is None else None
        show_json({"session_id": session_id, "path": path, "size": len(content), "base64": encoded})


@app.command()
def put(
    session_id: _SessionId,
    source: Annotated[Path, typer.Argument(metavar="FILE", help="Local file.")],
    path: Annotated[str | None, typer.Argument(metavar="PATH", help="Target path; default: the name of FILE.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Upload a file, replacing an existing one."""
    try:
        content = source.read_bytes()
    except OSError as error:
        raise CommandError(f"{source} cannot be read: {error.strerror}") from None
    with manager(url) as client:
        done = client.write_file(session_id, path or source.name, content)
    say("\n".join([f"{printable(done.path)}: {done.size} bytes", *done.notices]), done, as_json)


@app.command()
def delete(session_id: _SessionId, path: _Path, url: Url = None, as_json: AsJson = False) -> None:
    """Delete a file, a link or an empty folder."""
    with manager(url) as client:
        done = client.delete_file(session_id, path)
    say("\n".join([f"{printable(done.path)} is deleted", *done.notices]), done, as_json)
