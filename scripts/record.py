#!/usr/bin/env python3
"""Record a terminal session: run commands against a platform that runs, and write what they print as an SVG.

scripts/record.py docs/recording.svg                      the commands below: the picture in docs/command-line.md
scripts/record.py some.svg 'hypercore-agents list' ...    these
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
    """Run the commands in order; the first that fails ends the recording without a file."""
    output, *given = sys.argv[1:]
    console = Console(record=True, width=118, file=io.StringIO(), force_terminal=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    for command in given or COMMANDS:
        ran = subprocess.run(  # noqa: S603  whoever records says what is run
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
    # A name of its own for the styles, or every recording would differ from the last by a random one.
    drawn = console.export_svg(title="hypercore-agents", unique_id="recording")
    # The viewer's own monospaced font will do: a picture in the docs loads nothing from elsewhere.
    Path(output).write_text(re.sub(r"@font-face\s*{.*?}", "", drawn, flags=re.DOTALL))


if __name__ == "__main__":
    main()
