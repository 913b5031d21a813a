"""`.env.example` is what its script writes: every variable of every role, with its description and true default."""

import re
import runpy
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings

from hypercore_agents.autoscaler.settings import AutoscalerSettings
from hypercore_agents.cli.monitoring import MonitoringSettings
from hypercore_agents.gateway.settings import GatewaySettings
from hypercore_agents.manager.settings import NOT_ENFORCED, ManagerSettings, warnings_about
from hypercore_agents.simulator.settings import SimulatorSettings
from hypercore_agents.store.blobs import AWS_VARIABLES

ROLES: tuple[type[BaseSettings], ...] = (
    ManagerSettings,
    GatewaySettings,
    AutoscalerSettings,
    SimulatorSettings,
    MonitoringSettings,
)
EXAMPLE = Path(__file__).parents[2] / ".env.example"
COMPUTED_DEFAULTS = {"STATE_DIR", "POOL_CONFIG"}


def listed() -> dict[str, str]:
    lines = re.findall(r"^#([A-Z][A-Z0-9_]*)=(.*)$", EXAMPLE.read_text(), re.MULTILINE)
    assert len(lines) == len(dict(lines)), "a variable is listed twice"
    return dict(lines)


def fields() -> dict[str, Any]:
    """Return the settings by variable; of a variable that several roles read, the first role's."""
    return {
        f"{role.model_config.get('env_prefix') or ''}{name}".upper(): field
        for role in reversed(ROLES)
        for name, field in role.model_fields.items()
    }


def test_the_file_is_what_its_script_writes() -> None:
    written = runpy.run_path(str(EXAMPLE.parent / "scripts" / "env_example.py"))["text"]()
    assert EXAMPLE.read_text() == written, "run: python scripts/env_example.py"


def test_the_comment_of_a_variable_is_its_description() -> None:
    comments = {
        name: " ".join(lines.replace("#", "").split())
        for lines, name in re.findall(r"((?:^# .+\n)+)^#([A-Z][A-Z0-9_]*)=", EXAMPLE.read_text(), re.MULTILINE)
    }
    for name, field in fields().items():
        assert comments[name] == field.description


def test_every_variable_is_listed_and_nothing_else() -> None:
    assert set(listed()) == set(fields()) | set(NOT_ENFORCED) | set(AWS_VARIABLES)


def test_the_listed_defaults_are_the_true_ones() -> None:
    for name, shown in listed().items():
        field = fields().get(name)
        if field is None or name in COMPUTED_DEFAULTS:
            continue
        default = field.default
        if default is None or default == ():
            assert shown == "", name
        elif isinstance(default, bool):
            assert shown == str(default).lower(), name
        elif isinstance(default, tuple):
            assert shown == ",".join(default), name
        elif isinstance(default, (int, float)):
            assert float(shown) == default, name
        else:
            assert shown == default, name


def test_the_documented_table_of_settings_has_the_same_defaults() -> None:
    document = (EXAMPLE.parent / "docs" / "settings.md").read_text()
    rows = re.findall(r"^\| `([A-Z_]+)` \| (?:`(.*?)`|–) \| .+ \|$", document, re.MULTILINE)
    assert len(rows) > 15
    assert dict(rows) == {name: listed()[name] for name, _ in rows}


def test_the_manager_knows_the_variables_of_the_other_roles() -> None:
    others = {name for name in fields() if not name.startswith("SIMULATOR_")}
    assert warnings_about(dict.fromkeys(others, "x")) == []


def test_the_file_contains_no_secret() -> None:
    assert not re.search(r"sk-ant|eyJ", EXAMPLE.read_text())
