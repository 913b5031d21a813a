"""Writes `.env.example`: every variable of every role with its description and default, from the settings classes.

python scripts/env_example.py            writes the file
python scripts/env_example.py --check    fails if the file differs
"""

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings

from hypercore_agents.autoscaler.settings import AutoscalerSettings
from hypercore_agents.cli.monitoring import MonitoringSettings
from hypercore_agents.gateway.settings import GatewaySettings
from hypercore_agents.manager.settings import NOT_ENFORCED, ManagerSettings
from hypercore_agents.simulator.settings import SimulatorSettings
from hypercore_agents.store.blobs import AWS_VARIABLES

EXAMPLE = Path(__file__).parents[1] / ".env.example"
SECTIONS: dict[str, type[BaseSettings]] = {
    "Manager": ManagerSettings,
    "Gateway": GatewaySettings,
    "Autoscaler": AutoscalerSettings,
    "Monitoring: `hypercore-agents up --monitoring` runs Prometheus at PROMETHEUS_URL": MonitoringSettings,
    "Simulator of the Claude API": SimulatorSettings,
}
"""A variable that several roles read is in the section of the first one."""
_HEAD = """\
# Every setting, with its default. To change a setting, copy this file to .env and edit its line.
# The environment overrides .env. A value out of range is rejected at start with the variable's name.
# scripts/env_example.py writes this file from the descriptions in the settings classes.
"""


def text() -> str:
    """Return the file's content. Raises ValueError for a setting without a description."""
    parts, seen = [_HEAD], set[str]()
    for title, role in SECTIONS.items():
        parts.append(f"# --- {title}\n")
        for name, description, default in _variables(role):
            if name not in seen:
                seen.add(name)
                parts.append(_entry(name, description, default))
            if name == "BLOB_URL" and not seen.issuperset(AWS_VARIABLES):
                seen.update(AWS_VARIABLES)
                parts.extend(_entry(variable, meaning, "") for variable, meaning in AWS_VARIABLES.items())
    parts.append("# --- Accepted, but without effect so far: a warning at start says so\n")
    parts.extend(_entry(name, reason, "") for name, reason in NOT_ENFORCED.items())
    return "\n".join(parts)


def _variables(role: type[BaseSettings]) -> Iterator[tuple[str, str, str]]:
    for name, field in role.model_fields.items():
        variable = f"{role.model_config.get('env_prefix') or ''}{name}".upper()
        if not field.description:
            raise ValueError(f"{role.__name__}.{name} has no description")
        yield variable, field.description, "" if field.default_factory is not None else _shown(field.default)


def _entry(name: str, description: str, default: str) -> str:
    comment = "\n".join(textwrap.wrap(description, 98, initial_indent="# ", subsequent_indent="# "))
    return f"{comment}\n#{name}={default}\n"


def _shown(default: Any) -> str:
    if default is None:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float):
        return f"{default:.12g}"
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        EXAMPLE.write_text(text())
    elif EXAMPLE.read_text() != text():
        sys.exit(f"{EXAMPLE} is out of date: run python scripts/env_example.py")
