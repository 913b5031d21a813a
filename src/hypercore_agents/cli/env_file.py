"""`.env`, looked at before a command takes settings from it: what cannot be read is refused, with its line.

python-dotenv, which pydantic-settings reads it with, drops a line that it does not understand; a limit or a secret on
it would silently have its default. So would one that is only named (`ENABLE_AUTH` on a line of its own).
"""

import sys
from io import StringIO
from pathlib import Path

from hypercore_agents.cli.command_errors import CommandError

PATH = Path(".env")


def check() -> None:
    """Raise CommandFault where `.env` is no UTF-8 text of NAME=VALUE lines; warn of a name that it has twice."""
    if not PATH.exists():
        return
    from dotenv.parser import parse_stream

    if not PATH.is_file():
        raise CommandError(
            f"{PATH.absolute()} is no file; remove it, or put your settings there, one NAME=VALUE a line"
        )
    try:
        raw = PATH.read_bytes()
        text = raw.decode()
    except OSError as error:
        raise CommandError(f"cannot read {PATH.absolute()}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CommandError(f".env, line {line}: this is not UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise CommandError(f".env, line {line}: there is a null character; remove it")
    seen: dict[str, int] = {}
    for binding in parse_stream(StringIO(text.removeprefix("\ufeff"))):
        text = binding.original.string
        line = binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")
        if binding.error or (binding.key is not None and binding.value is None):
            raise CommandError(
                f".env, line {line}: this is not NAME=VALUE; a value with spaces, quotes or # goes in closed quotes"
            )
        if binding.key is not None:
            if binding.key in seen:
                first = seen[binding.key]
                sys.stderr.write(f"hypercore-agents: .env has {binding.key} on line {first} and {line}: {line} holds\n")
            seen[binding.key] = line
