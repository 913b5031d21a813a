#!/usr/bin/env python3
"""Records a terminal session: runs commands against a running platform and writes their output as an SVG.

scripts/record.py docs/recording.svg                      runs `COMMANDS`, for docs/command-line.md
scripts/record.py some.svg 'hypercore-agents list' ...    runs the given commands
"""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMANDS = (
    'hypercore-agents chat "Hello! Who are you?"',
    """hypercore-agents chat '[[tool Bash {"command": "echo made here | tee a.txt"}]] [[say I wrote it down.]]'""",
    "hypercore-agents spawn --cores 1 --memory 1024 --json | head -4",
    "hypercore-agents list",
    "hypercore-agents usage",
    "hypercore-agents loadtest --users 4 --requests 3 --ramp-up 1 2>/dev/null",
)


def main() -> None:
    """Run the commands in order. A failure ends the recording, and no file is written."""
    output, *given = sys.argv[1:]
    console = Console(record=True, width=118, file=io.StringIO(), force_terminal=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    for command in given or COMMANDS:
        ran = subprocess.run(  # noqa: S603  the commands are those of the caller
            ["/bin/bash", "-c", command],
            env={**os.environ, "PATH": path, "HYPERCORE_AGENTS_USER": "ada"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        console.print(Text(f"$ {command}", style="bold green"))
        console.print(Text(ran.stdout.rstrip()), soft_wrap=False)
        console.print()
    # A fixed id for the styles; the default is random and would change with each recording.
    drawn = console.export_svg(title="hypercore-agents", unique_id="recording")
    # The viewer's monospaced font is used: the picture loads nothing from the internet.
    Path(output).write_text(re.sub(r"@font-face\s*{.*?}", "", drawn, flags=re.DOTALL))


if __name__ == "__main__":
    main()
