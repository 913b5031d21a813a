"""The command that starts an agent, and what its user must be able to read for that."""

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hypercore_agents
from hypercore_agents.compute.base import SandboxRefused

_PACKAGE = Path(hypercore_agents.__file__).parent


@dataclass(frozen=True)
class AgentCommand:
    """`environment` holds variables without which the program is not found, `reads` paths that it must get to."""

    arguments: tuple[str, ...]
    reads: tuple[Path, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def installed_agent() -> AgentCommand:
    """Return the command that starts this installation's agent."""
    # An imported module's file, the prefixes' and the package's stand for the directories that Python reads.
    reads = (Path(sys.executable), Path(os.__file__), Path(sys.prefix), _PACKAGE / "__init__.py")
    try:
        importlib.metadata.distribution("hypercore-agents")
    except importlib.metadata.PackageNotFoundError:
        # A source checkout that is only on this process's path.
        source = (sys.executable, "-P", "-s", "-m", "hypercore_agents", "agent")
        return AgentCommand(source, reads, {"PYTHONPATH": str(_PACKAGE.parent)})
    return AgentCommand((sys.executable, "-I", "-m", "hypercore_agents", "agent"), reads)


def given_command(arguments: Sequence[str]) -> AgentCommand:
    """Return a command that somebody chose. Raises SandboxRefused when there is no such program."""
    program = shutil.which(arguments[0]) if arguments else None
    if program is None:
        raise SandboxRefused(
            f"command: {[*arguments][:1]} is not an executable program; give its path", field="command"
        )
    return AgentCommand((program, *arguments[1:]), (Path(program),))
