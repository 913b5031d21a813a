#!/usr/bin/env python3
"""Record a terminal session: run the commands given, one per argument, and write what they print as an SVG.

scripts/record.py docs/recording.svg 'hypercore-agents list' 'hypercore-agents chat "Hello!"'
"""

import io
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text


def main() -> None:
    """Run the commands in order; the first that fails ends the recording without a file."""
    output, *commands = sys.argv[1:]
    console = Console(record=True, width=118, file=io.StringIO(), force_terminal=True)
    for command in commands:
        ran = subprocess.run(
            ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )  # noqa: S603, S607
        console.print(Text(f"$ {command}", style="bold green"))
        console.print(Text(ran.stdout.rstrip()), soft_wrap=False)
        console.print()
    Path(output).write_text(console.export_svg(title="hypercore-agents"))


if __name__ == "__main__":
    main()
