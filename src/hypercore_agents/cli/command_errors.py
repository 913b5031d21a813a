"""Expected errors of a command: one line with the remedy and exit code 2. Defects print a traceback."""

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class CommandError(Exception):
    """The command cannot be executed; the message names what to change."""


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn expected errors into one line on standard error and exit code 2."""
    try:
        yield
    except Exception as error:
        from pydantic import ValidationError

        if isinstance(error, ValidationError):
            _fail("; ".join(explain(error)))
        if (unreadable := _unreadable(error)) is not None:
            _fail(unreadable)
        if not _is_expected(error):
            raise
        _fail(str(error))


def _is_expected(error: Exception) -> bool:
    from hypercore_agents.agent.gateway.enrolment import EnrolmentFailed
    from hypercore_agents.compute.base import SandboxRefused
    from hypercore_agents.kit.environment import SettingError
    from hypercore_agents.security.sealing import SealingError

    return isinstance(error, (CommandError, SettingError, SealingError, EnrolmentFailed, SandboxRefused))


def explain(error: "ValidationError") -> list[str]:
    """Return each error of a settings class as `VARIABLE: message`, or `VARIABLE.field: message` for a nested field."""
    prefix = "SIMULATOR_" if error.title == "SimulatorSettings" else ""
    messages = []
    for fault in error.errors(include_input=False, include_url=False):
        what = fault["msg"].removeprefix("Value error, ")
        if fault["type"] in ("bool_parsing", "bool_type"):
            what = "must be true or false"
        variable, *inside = map(str, fault["loc"] or ("",))
        where = ".".join((f"{prefix}{variable}".upper() if variable else "", *inside))
        messages.append(f"{where}: {what}" if where else what)
    return messages


def _unreadable(error: Exception) -> str | None:
    """Return a message for a variable whose JSON cannot be parsed, None for other errors."""
    from pydantic_settings import SettingsError

    if not isinstance(error, SettingsError):
        return None
    named = re.search(r'field "(\w+)"', str(error))
    variable = named[1].upper() if named else "a setting"
    return f'{variable}: must be a JSON object with names and strings in double quotes, such as {{"cores": 2}}'


def _fail(message: str) -> None:
    sys.stderr.write(f"hypercore-agents: {message}\n")
    raise SystemExit(2)
