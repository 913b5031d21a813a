"""The command that starts an agent, and the paths that the agent's user must be able to read for it."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hypercore_agents
from hypercore_agents.compute.base import SandboxRefused

_PACKAGE = Path(hypercore_agents.__file__).parent


@dataclass(frozen=True)
class AgentCommand:
    """A command line. `environment` has the variables without which it is not found, `reads` the paths it reads."""

    arguments: tuple[str, ...]
    reads: tuple[Path, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


LAUNCHER = "hypercore_agents.agent.launcher"
"""The module that starts an agent's server and its sessions. A name, because this package imports nothing of an agent.
"""

_PROBE_SECONDS = 30


def installed_agent() -> AgentCommand:
    """Return the command that starts this installation's agent."""
    # One file stands for each directory that Python reads: the standard library's, the prefix's and the package's.
    reads = (Path(sys.executable), Path(os.__file__), Path(sys.prefix), _PACKAGE / "__init__.py")
    try:
        importlib.metadata.distribution("hypercore-agents")
    except importlib.metadata.PackageNotFoundError:
        # A source checkout that is only on this process's path.
        source = (sys.executable, "-P", "-s", "-m", "hypercore_agents", "agent")
        return AgentCommand(source, reads, {"PYTHONPATH": str(_PACKAGE.parent)})
    return AgentCommand((sys.executable, "-I", "-m", "hypercore_agents", "agent"), reads)


def chosen_command(arguments: Sequence[str]) -> AgentCommand:
    """Return a command that the operator chose. Raises SandboxRefused if its program does not exist."""
    program = shutil.which(arguments[0]) if arguments else None
    if program is None:
        raise SandboxRefused(
            f"command: {[*arguments][:1]} is not an executable program; give its path", field="command"
        )
    return AgentCommand((program, *arguments[1:]), (Path(program),))


@dataclass(frozen=True)
class LauncherProbe:
    """What the launcher can do on this host. `why_not`: why it cannot isolate sessions, None if it can.

    `session_disk` is one sentence on how it limits the files of sessions.
    """

    why_not: str | None
    session_disk: str = "not limited"

    @property
    def exact_disk(self) -> bool:
        """Whether the kernel counts the files of sessions."""
        return self.session_disk.startswith("exact")


def with_launcher(
    command: AgentCommand,
    uid: int,
    session_uids: range,
    state: Path,
    *,
    control_groups: bool,
    session_disk_mb: int,
    siblings: Path,
    exposed: Sequence[Path] = (),
) -> list[str]:
    """Return the command line that starts an installed agent under its launcher, which must start as root.

    `siblings` is the folder that holds the folders of all agents.
    """
    options = ["--uid", str(uid), "--session-uids", f"{session_uids.start}-{session_uids.stop - 1}"]
    options += ["--state", str(state), "--siblings", str(siblings), "--session-disk-mb", str(session_disk_mb)]
    options += [] if control_groups else ["--no-control-groups"]
    options += [word for path in exposed for word in ("--expose", str(path))]
    return [*_python(command), LAUNCHER, *options, "--", *command.arguments]


def probe_launcher(command: AgentCommand, folder: Path) -> LauncherProbe:
    """Run the launcher's probe on this host, with files in or near a folder. Blocks."""
    while not folder.exists():
        folder = folder.parent
    try:
        output = subprocess.run(  # noqa: S603 (our own interpreter and module)
            [*_python(command), LAUNCHER, "--probe", "--state", str(folder)],
            env={"PATH": os.defpath, **command.environment}, cwd="/", capture_output=True, timeout=_PROBE_SECONDS,
            check=True,
        ).stdout  # fmt: skip
        answer = json.loads(output)
        if answer["separates"]:
            return LauncherProbe(None, str(answer["disk"]))
        return LauncherProbe(str(answer["reason"]))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        return LauncherProbe(f"its launcher does not work: {error}")


def _python(command: AgentCommand) -> list[str]:
    """Return an installed agent's command line up to `-m`."""
    return [*command.arguments[: command.arguments.index("-m") + 1]]
