#!/usr/bin/env python3
"""Record a terminal session: run the commands given, one per argument, and write what they print as an SVG.

scripts/record.py docs/recording.svg 'hypercore-agents list' 'hypercore-agents chat "Hello!"'
"""

import io
import re
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
        ran = subprocess.run(  # noqa: S603  whoever records says what is run
            ["/bin/bash", "-c", command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        console.print(Text(f"$ {command}", style="bold green"))
        console.print(Text(ran.stdout.rstrip()), soft_wrap=False)
        console.print()
    drawn = console.export_svg(title="hypercore-agents")
    # The viewer's own monospaced font will do: a picture in the docs loads nothing from elsewhere.
    Path(output).write_text(re.sub(r"@font-face\s*{.*?}", "", drawn, flags=re.DOTALL))


if __name__ == "__main__":
    main()
