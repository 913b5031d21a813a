"""`config show`: every setting with its effective value and where that comes from; secrets are masked."""

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from hypercore_agents.cli.remote import AsJson, show_json, show_table

if TYPE_CHECKING:
    from pydantic_settings import BaseSettings

app = typer.Typer(help="Show the effective configuration.", no_args_is_help=True)
_SECRET = re.compile(r"(KEY|SECRET|PASSWORD|TOKEN)$")
_USERINFO = re.compile(r"(://[^:/@\s]*):[^@\s]*@")
MASK = "********"


@app.callback()
def _group() -> None:
    """Show the effective configuration."""


@app.command()
def show(as_json: AsJson = False) -> None:
    """Show each setting, its value and where it comes from.

    That is the environment, `.env` or the default; secrets are masked.
    """
    rows = list(effective())
    if as_json:
        show_json(rows)
        return
    shown = [(row["name"], row["value"], row["source"], ", ".join(row["roles"])) for row in rows]
    show_table(("NAME", "VALUE", "SOURCE", "ROLES"), shown, empty="")


def effective() -> Iterator[dict[str, Any]]:
    """Yield name, value, source and roles of each setting, by name. Raises ValidationError for a wrong one."""
    from dotenv import dotenv_values

    from hypercore_agents.autoscaler.settings import AutoscalerSettings
    from hypercore_agents.gateway.settings import GatewaySettings
    from hypercore_agents.manager.settings import ManagerSettings

    in_file = {name.upper() for name, value in dotenv_values(".env").items() if value}
    in_environment = {name.upper() for name, value in os.environ.items() if value}
    found: dict[str, dict[str, Any]] = {}
    roles: dict[str, BaseSettings] = {
        "manager": ManagerSettings(), "gateway": GatewaySettings(), "autoscaler": AutoscalerSettings(),
    }  # fmt: skip
    for role, settings in roles.items():
        for field in type(settings).model_fields:
            name = field.upper()
            source = "environment" if name in in_environment else ".env" if name in in_file else "default"
            row = {"name": name, "value": _shown(name, getattr(settings, field)), "source": source, "roles": [role]}
            found.setdefault(name, {**row, "roles": []})["roles"].append(role)
    yield from (found[name] for name in sorted(found))


def _shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    if _SECRET.search(name) or hasattr(value, "get_secret_value"):
        return MASK
    if hasattr(value, "model_dump_json"):
        return str(value.model_dump_json(exclude_none=True))
    if isinstance(value, tuple | list | frozenset):
        return " ".join(str(item) for item in value)
    return _USERINFO.sub(rf"\1:{MASK}@", str(value))
