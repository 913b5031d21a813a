"""Shared parts of commands that call a manager: its address, the output of answers, and exit codes.

    0    success                                3    no answer, or the answer was cut off
    1    the server refused or the turn failed  130  interrupted
    2    invalid argument or setting

Results go to standard output, everything else to standard error. This module imports nothing heavy: a command imports
the client when it runs.
"""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel

    from hypercore_agents.client import Client, ServerError

REFUSED, WRONG_USE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130

Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="URL of the manager; default HYPERCORE_AGENTS_URL, else LISTEN_ADDR of this machine."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
User = Annotated[
    str | None, typer.Option(metavar="ID", help="User id; default HYPERCORE_AGENTS_USER, else your login name.")
]

_REMEDIES = {
    "unauthenticated": "set HYPERCORE_AGENTS_TOKEN; an operator creates one with: hypercore-agents tokens create",
    "forbidden": "ask an operator for a token with a wider scope, or name yourself with --user",
    "at_capacity": "the pool is full: wait, raise MAX_AGENTS, or spawn a dedicated agent",
    "agent_unreachable": "see: hypercore-agents list, and hypercore-agents logs AGENT_ID",
    "unavailable": "see: hypercore-agents doctor",
}


@contextlib.contextmanager
def manager(url: str | None) -> Iterator["Client"]:
    """Yield a client; an error inside the block prints one line with the remedy and ends the command."""
    from hypercore_agents.client import Client, ClientError, Retrying, ServerError

    try:
        client = Client(url or default_url(), retrying=Retrying(outage=5.0))
    except ClientError as error:
        fail(f"{error}; it comes from --url, HYPERCORE_AGENTS_URL or LISTEN_ADDR", WRONG_USE)
    try:
        yield client
    except ServerError as error:
        fail(explained(error), REFUSED)
    except ClientError as error:
        fail(
            f"{error}\n  is it running? Start it with: hypercore-agents up --demo, or pass its address with --url",
            UNREACHABLE,
        )
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(0) from None


def explained(error: "ServerError") -> str:
    """Return the message of an error, with its remedy if there is one."""
    remedy = _REMEDIES.get(error.type)
    return f"{error}{f'{chr(10)}  {remedy}' if remedy else ''}"


def fail(message: str, code: int) -> NoReturn:
    """End the command with a message and an exit code."""
    sys.stderr.write(f"hypercore-agents: {message}\n")
    raise SystemExit(code)


def default_url() -> str | None:
    """Return HYPERCORE_AGENTS_URL, else the URL of LISTEN_ADDR from the environment or `.env`."""
    if os.environ.get("HYPERCORE_AGENTS_URL"):
        return os.environ["HYPERCORE_AGENTS_URL"]
    listen = os.environ.get("LISTEN_ADDR")
    if not listen:
        from hypercore_agents.cli import env_file
        from hypercore_agents.kit.environment import setting

        env_file.check()
        listen = setting("LISTEN_ADDR")
    return f"http://{listen.replace('0.0.0.0', '127.0.0.1').replace('[::]', '[::1]')}" if listen else None  # noqa: S104


def default_user() -> str:
    """Return the user id of commands without --user."""
    import getpass

    if given := os.environ.get("HYPERCORE_AGENTS_USER"):
        return given
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # Python 3.13 raises the latter
        fail("your uid has no name on this machine: set the user with --user or HYPERCORE_AGENTS_USER", WRONG_USE)


def show_json(value: "BaseModel | Any") -> None:
    """Print a value as JSON and flush: `up` keeps running afterwards, and a pipe would see nothing until it ends."""
    dump = getattr(value, "model_dump", None)
    plain = (sys.stdout.encoding or "utf-8").lower().replace("_", "-") not in ("utf-8", "utf8")
    sys.stdout.write(json.dumps(dump(mode="json") if dump else value, indent=2, ensure_ascii=plain) + "\n")
    sys.stdout.flush()


def say(text: str, value: Any, as_json: bool) -> None:
    """Print a result as text, or as JSON."""
    if as_json:
        show_json(value)
    else:
        sys.stdout.write(f"{text}\n")


def printable(text: str) -> str:
    """Return text without control characters: output of models and tools can contain terminal escapes."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\t\n")


def utc(seconds: float) -> str:
    """Return Unix seconds as an ISO 8601 time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    """Print rows as a table of their own width; without rows, print `empty` to standard error."""
    if not rows:
        sys.stderr.write(f"{empty}\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=not sys.stdout.isatty())
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    if sys.stdout.isatty():
        Console(highlight=False).print(table)
        return
    console = Console(highlight=False, width=1000, file=io.StringIO())
    with console.capture() as printed:
        console.print(table)
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in printed.get().splitlines())


@contextlib.contextmanager
def waiting(what: str, *, quiet: bool) -> Iterator[None]:
    """Show a spinner on a terminal during the block."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
