"""Settings outside of the settings classes, read by the same rules: the environment, then `.env`.

The rules are those of pydantic-settings in the roles: names ignore case, an empty value counts as unset, the
environment takes precedence over `.env`, and `.env` is UTF-8 with or without a byte order mark, in python-dotenv's
syntax (`export`, quotes, comments, `${NAME}`).
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dotenv import dotenv_values

if TYPE_CHECKING:
    from pydantic_settings import SettingsConfigDict

ENV_FILE = Path(".env")
_ENCODING = "utf-8-sig"
SETTINGS: "SettingsConfigDict" = {
    "env_file": ENV_FILE,
    "env_file_encoding": _ENCODING,
    "extra": "ignore",
    "hide_input_in_errors": True,
    "env_ignore_empty": True,
    "allow_inf_nan": False,
}
"""`model_config` of every settings class."""
DEFAULT_STATE_FOLDER = ".hypercore-agents"


class SettingError(ValueError):
    """A setting cannot be used. The message names the variable and the remedy, and contains no secret."""


def from_env_file(path: Path = ENV_FILE) -> dict[str, str]:
    """Return the variables of `.env` that have a value; none if the file does not exist."""
    return {name: value for name, value in dotenv_values(path, encoding=_ENCODING).items() if value}


def with_env_file(names: Collection[str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment merged over `.env`. Variables among `names`, in any case, get their upper-case name."""
    return {**_named(from_env_file(), names), **_named(environment, names)}


def setting(name: str) -> str | None:
    """Return the value of one variable, None if neither the environment nor `.env` has one."""
    for source in (os.environ, from_env_file()):
        if found := _named(source, (name,)).get(name):
            return found
    return None


def _named(source: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in source.items():
        canonical = name.upper() if name.upper() in names else name
        if value and (canonical == name or not source.get(canonical)):
            found[canonical] = value
    return found


def default_state_dir() -> Path:
    """Return the default of STATE_DIR. Raises SettingError for a user without a home directory."""
    try:
        return Path.home() / DEFAULT_STATE_FOLDER
    except RuntimeError:
        raise SettingError(f"STATE_DIR is not set, and user {os.geteuid()} has no home directory: set it") from None


def state_dir() -> Path:
    """Return the state folder, absolute. Raises SettingError."""
    return Path(setting("STATE_DIR") or default_state_dir()).absolute()


def make_state_dir(path: Path, variable: str = "STATE_DIR") -> None:
    """Create the folder that a variable names if it does not exist. Raises SettingError if it cannot be used."""
    remedy = f"set {variable} to a folder that user {os.geteuid()} can write"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SettingError(f"{variable}: cannot create the folder {path}: {why}; {remedy}") from None
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise SettingError(f"{variable}: the folder {path} is not writable; {remedy}")
