"""Validation of `.env` before a command reads settings from it: invalid lines are rejected with their number.

python-dotenv, which pydantic-settings uses, ignores lines that it cannot parse, so a limit or a secret on such a line
would silently have its default value. The same holds for a name without a value (`ENABLE_AUTH` alone on a line).
"""

import sys
from io import StringIO
from pathlib import Path

from hypercore_agents.cli.command_errors import CommandError

PATH = Path(".env")


def check() -> None:
    """Raise CommandError if `.env` is not UTF-8 text of NAME=VALUE lines; warn about duplicate names."""
    if not PATH.exists():
        return
    from dotenv.parser import parse_stream

    if not PATH.is_file():
        raise CommandError(f"{PATH.absolute()} is not a file; remove it, or replace it with a file of NAME=VALUE lines")
    try:
        raw = PATH.read_bytes()
        text = raw.decode()
    except OSError as error:
        raise CommandError(f"cannot read {PATH.absolute()}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CommandError(f".env, line {line}: not valid UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise CommandError(f".env, line {line}: contains a null character; remove it")
    seen: dict[str, int] = {}
    for binding in parse_stream(StringIO(text.removeprefix("\ufeff"))):
        text = binding.original.string
        line = binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")
        if binding.error or (binding.key is not None and binding.value is None):
            raise CommandError(f".env, line {line}: not NAME=VALUE; enclose a value with spaces, quotes or # in quotes")
        if binding.key is not None:
            if binding.key in seen:
                first = seen[binding.key]
                sys.stderr.write(
                    f"hypercore-agents: .env sets {binding.key} on lines {first} and {line}; line {line} applies\n"
                )
            seen[binding.key] = line
