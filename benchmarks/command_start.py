"""Startup time of the command line: `--help` in a new process, compared with a bare interpreter.

Each round measures `python -c pass`, `hypercore-agents --help`, the help of a subcommand and a completion, in turn.
Aim: under 0.3 s to `--help`.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from measuring import arguments, percentile, progress, table, write_json

AIM_SECONDS = 0.3


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """Return the duration of a process, in seconds."""
    started = time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def main() -> None:
    """Run from the command line."""
    options = arguments(__doc__ or "").parse_args()
    script = str(Path(sys.executable).parent / "hypercore-agents")
    completing = {"_HYPERCORE_AGENTS_COMPLETE": "complete_bash", "COMP_WORDS": "hypercore-agents do", "COMP_CWORD": "1"}
    commands: dict[str, tuple[list[str], dict[str, str]]] = {
        "python -c pass": ([sys.executable, "-c", "pass"], {}),
        "hypercore-agents --help": ([script, "--help"], {}),
        "hypercore-agents chat --help": ([script, "chat", "--help"], {}),
        "a completion": ([script], completing),
    }
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(10 if options.quick else 40):
        for name, (command, more) in commands.items():
            found[name].append(seconds(command, {**os.environ, **more}))
    figures = {
        name: {f"p{share}_ms": percentile(taken, share / 100) * 1000 for share in (50, 95)}
        for name, taken in found.items()
    }
    rows = [[name, f"{times['p50_ms']:.0f}", f"{times['p95_ms']:.0f}"] for name, times in figures.items()]
    table("Start of a command, ms", ["command", "p50", "p95"], rows)
    met = figures["hypercore-agents --help"]["p50_ms"] <= AIM_SECONDS * 1000
    progress(f"aim: --help within {AIM_SECONDS * 1000:.0f} ms (p50): {'met' if met else 'missed'}")
    write_json(options.json, {"benchmark": "command_start", "aims_met": met, "commands": figures})


if __name__ == "__main__":
    main()
