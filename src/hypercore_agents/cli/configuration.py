"""`hypercore-agents config`: all settings with their effective values and sources; secrets are masked."""

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.cli.remote import AsJson, say, show_json, show_table

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
    """Show each setting with its value and source.

    The source is the environment, `.env` or the default. Secrets are masked.
    """
    rows = list(effective())
    if as_json:
        show_json(rows)
        return
    shown = [(row["name"], row["value"], row["source"], ", ".join(row["roles"])) for row in rows]
    show_table(("NAME", "VALUE", "SOURCE", "ROLES"), shown, empty="")


@app.command("get")
def get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A variable, such as STATE_DIR.")],
    default: Annotated[
        str | None, typer.Option(help="Value to print if the setting is unset, instead of the built-in default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the value of one setting, for scripts.

    Reads the environment, then `.env`, then the default. Secrets are refused.
    """
    wanted = name.upper()
    fields = {field.upper(): info for role in _roles().values() for field, info in role.model_fields.items()}
    if wanted not in fields or _SECRET.search(wanted):
        why = "is a secret" if wanted in fields else "is not a setting"
        raise CommandError(f"{name} {why}; see: hypercore-agents config show")
    from hypercore_agents.kit.environment import setting

    value = setting(wanted) or default
    # Other settings may be invalid: a command that stops a platform must still find its folder.
    shown = value if value is not None else _shown(wanted, fields[wanted].get_default(call_default_factory=True))
    say(shown, {"name": wanted, "value": shown}, as_json)


def effective() -> Iterator[dict[str, Any]]:
    """Yield name, value, source and roles of each setting, by name. Raises ValidationError for an invalid one."""
    from hypercore_agents.kit.environment import from_env_file

    in_file = {name.upper() for name in from_env_file()}
    in_environment = {name.upper() for name, value in os.environ.items() if value}
    rows: dict[str, dict[str, Any]] = {}
    for role, settings in ((name, chosen()) for name, chosen in _roles().items()):
        for field in type(settings).model_fields:
            name = field.upper()
            source = "environment" if name in in_environment else ".env" if name in in_file else "default"
            row = {"name": name, "value": _shown(name, getattr(settings, field)), "source": source, "roles": [role]}
            rows.setdefault(name, {**row, "roles": []})["roles"].append(role)
    yield from (rows[name] for name in sorted(rows))


def _roles() -> "dict[str, type[BaseSettings]]":
    from hypercore_agents.autoscaler.settings import AutoscalerSettings
    from hypercore_agents.gateway.settings import GatewaySettings
    from hypercore_agents.manager.settings import ManagerSettings

    return {"manager": ManagerSettings, "gateway": GatewaySettings, "autoscaler": AutoscalerSettings}


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
