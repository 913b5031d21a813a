"""Configures structured logging for every role: one line per event, with secrets masked.

`LOG_FORMAT=json` writes one JSON object per line; `console` is for reading in a terminal. The loggers of the standard
library (uvicorn, SQLAlchemy, the Agent SDK) use the same renderer. Prompts and answers are never logged.

Lines that clients can cause at will are rate-limited (`log_limits.py`).

No code passes secrets to the log; masking is a second line of defence.
"""

import logging
import re
import sys
from typing import Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from hypercore_agents.observability.log_limits import LogLimits

LogFormat = Literal["json", "console"]

_SECRETS = re.compile(
    r"sk-ant-[A-Za-z0-9_-]{4,}"  # Claude API keys
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+"  # JWTs
    r"|(?i:bearer)\s+[A-Za-z0-9._~+/=-]{16,}"
)


def mask_secrets(text: str) -> str:
    """Return the text with everything that looks like a credential masked."""
    return _SECRETS.sub("[masked]", text)


def _mask(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = mask_secrets(value)
    return event


def configure_logging(role: str, *, level: str = "INFO", format: LogFormat = "json") -> None:
    """Configure structlog and the standard library for this process. Called once, in the composition root.

    `level` is the name of a standard level; every line has `role`.
    """

    def add_role(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event.setdefault("role", role)
        return event

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        add_role,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    renderer: list[Processor] = (
        [structlog.processors.format_exc_info, _mask, structlog.processors.JSONRenderer()]
        if format == "json"
        else [
            structlog.processors.format_exc_info,
            _mask,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(LogLimits())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for verbose in ("uvicorn.access", "aiosqlite", "asyncio", "sqlalchemy.engine", "alembic"):
        logging.getLogger(verbose).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, root.level))  # omits its lines on start and stop
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers[:] = []
        logging.getLogger(name).propagate = True
