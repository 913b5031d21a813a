"""What commands that speak to a manager share: where it is, how an answer is shown, what an error's exit code is.

    0    done                                   3    nobody answers, or the answer broke off
    1    the server refused or the turn failed  130  interrupted
    2    a wrong argument or setting

Results go to standard output, everything else to standard error. Nothing heavy is imported here: a command imports the
client when it runs.
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
    typer.Option(metavar="URL", help="The manager; default HYPERCORE_AGENTS_URL, else this machine's LISTEN_ADDR."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
User = Annotated[
    str | None, typer.Option(metavar="ID", help="Whose; default HYPERCORE_AGENTS_USER, else your login name.")
]

_REMEDIES = {
    "unauthenticated": "set HYPERCORE_AGENTS_TOKEN; an operator makes one with: hypercore-agents tokens create",
    "forbidden": "ask an operator for a token that reaches further, or name yourself with --user",
    "at_capacity": "the pool is full: wait, raise MAX_AGENTS, or spawn an agent of your own",
    "agent_unreachable": "look at: hypercore-agents list, and hypercore-agents logs AGENT_ID",
    "unavailable": "look at: hypercore-agents doctor",
}


@contextlib.contextmanager
def manager(url: str | None) -> Iterator["Client"]:
    """Give a client; errors of the calls inside are told in one line with the remedy, and end the command."""
    from hypercore_agents.client import Client, ClientError, Retrying, ServerError

    try:
        client = Client(url or default_url(), retrying=Retrying(outage=5.0))
    except ClientError as error:
        fail(f"{error}; it is what --url, HYPERCORE_AGENTS_URL or LISTEN_ADDR says", WRONG_USE)
    try:
        yield client
    except ServerError as error:
        fail(explained(error), REFUSED)
    except ClientError as error:
        fail(f"{error}\n  is it running? Start it with: hypercore-agents up --demo, or name it with --url", UNREACHABLE)
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(0) from None


def explained(error: "ServerError") -> str:
    """Return an error in words, with what may help."""
    remedy = _REMEDIES.get(error.type)
    return f"{error}{f'{chr(10)}  {remedy}' if remedy else ''}"


def fail(message: str, code: int) -> NoReturn:
    """End the command with one message and an exit code."""
    sys.stderr.write(f"hypercore-agents: {message}\n")
    raise SystemExit(code)


def default_url() -> str | None:
    """Return HYPERCORE_AGENTS_URL, else where this machine's manager listens by the environment and `.env`."""
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
    """Return the user that a command speaks for when none is named."""
    import getpass

    if given := os.environ.get("HYPERCORE_AGENTS_USER"):
        return given
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # Python 3.13 raises the latter
        fail("your login has no name on this machine: name yourself with --user or HYPERCORE_AGENTS_USER", WRONG_USE)


def show_json(value: "BaseModel | Any") -> None:
    """Print a value as JSON, at once: a command that goes on serving (`up`) would keep it from a pipe until its end."""
    dump = getattr(value, "model_dump", None)
    plain = (sys.stdout.encoding or "utf-8").lower().replace("_", "-") not in ("utf-8", "utf8")
    sys.stdout.write(json.dumps(dump(mode="json") if dump else value, indent=2, ensure_ascii=plain) + "\n")
    sys.stdout.flush()


def say(text: str, value: Any, as_json: bool) -> None:
    """Print what was done: in words, or the same as JSON."""
    if as_json:
        show_json(value)
    else:
        sys.stdout.write(f"{text}\n")


def printable(text: str) -> str:
    """Return text without what a terminal would obey: a model or a tool may have said anything."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\t\n")


def utc(seconds: float) -> str:
    """Return Unix seconds as a point of time that people and programs read."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    """Print rows as a table as wide as they are; without rows, one sentence to standard error."""
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
    """Show on a terminal that something takes its time."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
