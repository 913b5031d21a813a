"""Shared parts of the benchmarks: arguments, percentiles, the printed table and the written JSON."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options common to all benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="run for less than a minute")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    return parser


def percentile(values: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile; `share` between 0 and 1."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one table."""
    shown = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        shown.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        shown.add_row(*row)
    console = Console()
    console.width = max(console.width, 110)  # also without a terminal that reports its width
    console.print(shown)


def progress(text: str) -> None:
    """Print progress to standard error."""
    sys.stderr.write(f"{text}\n")


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write the figures and a description of the machine."""
    if path is None:
        return
    machine = {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    path.write_text(json.dumps({"measured_at": time.time(), "machine": machine, **figures}, indent=2) + "\n")
