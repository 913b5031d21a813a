"""Expected faults of a command, told in one line with the remedy; exit code 2. Defects keep their trace."""

import contextlib
import sys
from collections.abc import Iterator


class CommandFault(Exception):
    """The command cannot do what was asked; the message says what to change."""


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn expected faults into one line on standard error and exit code 2."""
    try:
        yield
    except Exception as error:
        from pydantic import ValidationError

        if isinstance(error, ValidationError):
            faults = [(fault["loc"], fault["msg"].removeprefix("Value error, ")) for fault in error.errors()]
            _fail("; ".join(f"{str(where[0]).upper()}: {what}" if where else what for where, what in faults))
        if not _is_expected(error):
            raise
        _fail(str(error))


def _is_expected(error: Exception) -> bool:
    from hypercore_agents.agent.enrolment import EnrolmentFailed
    from hypercore_agents.compute.base import SandboxRefused
    from hypercore_agents.http.serve import AddressError
    from hypercore_agents.security.sealing import SealingError
    from hypercore_agents.store.database import DatabaseUrlError

    return isinstance(
        error, (CommandFault, AddressError, SealingError, DatabaseUrlError, EnrolmentFailed, SandboxRefused)
    )


def _fail(message: str) -> None:
    sys.stderr.write(f"hypercore-agents: {message}\n")
    raise SystemExit(2)
