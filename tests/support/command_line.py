"""The command line, run in this process to save the second that a process takes to start."""

import json
import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

from typer.testing import CliRunner

from hypercore_agents.cli.main import main


@dataclass(frozen=True)
class Ended:
    """The output and exit code of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The standard output, parsed as JSON."""
        return json.loads(self.out)


def command(*arguments: str, given: str = "", **environment: str | None) -> Ended:
    """Run a command with `given` as its standard input. A value of None removes an environment variable."""
    with (
        CliRunner().isolation(given, env=environment) as (out, err, _),
        mock.patch.object(sys, "argv", ["hypercore-agents", *arguments]),
    ):
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        sys.stderr.flush()
        return Ended(int(code or 0), out.getvalue().decode(), err.getvalue().decode())
