"""A table of wrong values for every variable: each fails the start with one line that names the variable."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from hypercore_agents.autoscaler.settings import AutoscalerSettings
from hypercore_agents.cli.command_errors import explained
from hypercore_agents.cli.monitoring import MonitoringSettings
from hypercore_agents.gateway.app import check_at_start as check_gateway
from hypercore_agents.gateway.settings import GatewaySettings
from hypercore_agents.manager.app import check_at_start as check_manager
from hypercore_agents.manager.settings import ManagerSettings
from hypercore_agents.simulator.serve import check_at_start as check_simulator
from hypercore_agents.simulator.settings import SimulatorSettings

ADDRESSES = ("8080", "::1:8080", "[::zz]:8080", "host:99999", "a b:80", "host:٨٠", ":80")
SWITCH = ("maybe",)
URLS = ("ftp://host", "host:80", "http://user:secret-in-url@host", "http://")
LEVELS = ("loud",)
COUNT = ("-1", "many", "1.5", "1e99", "")[:4]
SECONDS = ("-1", "soon", "inf", "nan")
SHARE = ("-0.1", "half", "1.5", "nan")
DATABASES = (
    "nonsense", "mysql://host/name", "sqlite+aiosqlite:////missing-folder/store.db",
    "postgresql+psycopg://user:secret-in-url@127.0.0.1:1/name", "postgresql+psycopg://user@127.0.0.1:port/name",
)  # fmt: skip
BLOBS = ("nonsense", "gs://bucket", "s3://", "http://host/bucket", "file://relative/path", "file:///dev/null/blobs")
MISSING = "/missing/file"
IN_A_FILE = "/dev/null/below"

WRONG: dict[str, tuple[str, ...]] = {
    "AGENT_TOKEN_SECONDS": SECONDS,
    "ALERTMANAGER_URL": URLS,
    "ALLOWED_BETAS": ("a b", "x" * 200),
    "ALLOWED_MODELS": ("a b", "-x"),
    "ALLOWED_SERVER_TOOLS": ("a b", "-x"),
    "ALLOW_PLATFORM_KEY": SWITCH,
    "ALLOW_UNISOLATED_TOOLS": SWITCH,
    "ALLOW_WILDCARD_ADDR": SWITCH,
    "ANTHROPIC_API_KEY": ("two words", "ключ"),
    "APPROVAL_TIMEOUT": SECONDS,
    "AUTOSCALER_ADDR": ADDRESSES,
    "AUTOSCALER_ALLOW_ANY_ADDRESS": SWITCH,
    "AUTOSCALER_DECISIONS": COUNT,
    "AUTOSCALER_DRY_RUN": SWITCH,
    "AUTOSCALER_INTERVAL": SECONDS,
    "AUTOSCALER_SIGNALS": ("graphite",),
    "AUTOSCALER_TIMEOUT": SECONDS,
    "AUTOSCALER_TOKEN": ("two words",),
    "BACKGROUND_MAX": SECONDS,
    "BASE_DOMAIN": ("two words", "10.0.0.1", "-x.example", "http://example.com"),
    "BLOB_URL": BLOBS,
    "BOOT_TIMEOUT": SECONDS,
    "CLAUDE_API_URL": ("ftp://host", "host", "https://user:secret-in-url@host"),
    "CLAUDE_MODEL": ("two words", "\u00e9"),
    "COMPUTE_BACKEND": ("lambda",),
    "CONSOLIDATION_WINDOW": SECONDS,
    "CPU_OVERCOMMIT": SECONDS,
    "DATABASE_URL": DATABASES,
    "DEFAULT_MAX_TOKENS": COUNT,
    "DEFAULT_TEMPERATURE": SHARE,
    "DRAIN_TIMEOUT": SECONDS,
    "ENABLE_AUTH": (*SWITCH, "true"),
    "GATEWAY_ADDR": ADDRESSES,
    "GATEWAY_OPERATOR_ADDR": ADDRESSES,
    "GATEWAY_URL": URLS,
    "HEALTH_CHECK_INTERVAL": SECONDS,
    "JWT_SECRET": ("short",),
    "KEY_FILE": ("/dev/null", IN_A_FILE, "/missing-folder/keys.json", "/"),
    "LISTEN_ADDR": (*ADDRESSES, "0.0.0.0:8080"),
    "LIVE_SESSIONS": COUNT,
    "LOG_CONTENT": SWITCH,
    "LOG_FORMAT": ("xml",),
    "LOG_LEVEL": LEVELS,
    "MANAGER_URL": URLS,
    "MAX_AGENTS": COUNT,
    "MODEL_BODIES_MB": COUNT,
    "MAX_DOWNLOADS_PER_USER": COUNT,
    "MAX_EVENT_STREAMS_PER_USER": COUNT,
    "MAX_SESSIONS_PER_USER": COUNT,
    "PLACES_PER_USER": (*SHARE, "0"),
    "STARTS_PER_HOST": COUNT,
    "USER_STORAGE_MB": COUNT,
    "MAX_AGENTS_PER_USER": COUNT,
    "MAX_CONCURRENT_REQUESTS": COUNT,
    "MICROVM_ACCELERATOR": ("xen",),
    "MICROVM_MEMORY_MB": COUNT,
    "MIN_AGENTS": (*COUNT, "9999"),
    "MODEL_PRICES": (MISSING, "/dev/null", "/"),
    "MODEL_REQUESTS_PER_SESSION": COUNT,
    "MODEL_REQUEST_SECONDS": SECONDS,
    "OTLP_ENDPOINT": ("host:4318", "ftp://host"),
    "PANIC_WINDOW": SECONDS,
    "PARK_AFTER": SECONDS,
    "PLACE_TTL": SECONDS,
    "POOL_CONFIG": ("{cores:2}", "[]", '"text"', '{"cores": 99}', '{"kores": 2}', '{"options": {"modell": "x"}}'),
    "PROMETHEUS_URL": URLS,
    "RATE_LIMIT_PER_HOUR": COUNT,
    "RATE_LIMIT_PER_MINUTE": COUNT,
    "REQUEST_TIMEOUT": COUNT,
    "SCALE_DOWN_THRESHOLD": (*SHARE, "0.9"),
    "SCALE_UP_THRESHOLD": (*SHARE, "0.1"),
    "SCRATCH_MB": COUNT,
    "SESSION_DISK_MB": COUNT,
    "SESSION_TOKEN_SECONDS": SECONDS,
    "ENDED_AGENTS_TTL": SECONDS,
    "ENDED_SESSIONS_TTL": SECONDS,
    "LEDGER_TTL": SECONDS,
    "SESSION_TTL": SECONDS,
    "SIGNALS_MAX_AGE": SECONDS,
    "SIMULATOR_ALLOW_ANY_ADDRESS": SWITCH,
    "SIMULATOR_API_KEYS_FILE": (MISSING, "/"),
    "SIMULATOR_FAULT": ("explode",),
    "SIMULATOR_GRACE": SECONDS,
    "SIMULATOR_HANG_LIMIT": SECONDS,
    "SIMULATOR_LISTEN": ADDRESSES,
    "SIMULATOR_RATE": SECONDS,
    "SIMULATOR_RECORD": SWITCH,
    "SIMULATOR_RECORD_BYTES": COUNT,
    "SIMULATOR_STATE_DIR": (IN_A_FILE,),
    "SIMULATOR_TOKENS": COUNT,
    "SIMULATOR_TTFT": SECONDS,
    "SIMULATOR_WORKERS": COUNT,
    "EXPOSED_PATHS": (MISSING, "relative", "/etc", "/usr/bin:/"),
    "SKILLS_DIR": (MISSING, "/dev/null"),
    "SPAWN_SECONDS": SECONDS,
    "STABILISATION_WINDOW": SECONDS,
    "STARTS_AT_ONCE": COUNT,
    "START_TIMEOUT": SECONDS,
    "STATE_DIR": ("/dev/null", IN_A_FILE),
    "STOP_AGENTS_ON_EXIT": SWITCH,
    "STOP_GRACE": SECONDS,
    "TARGET_SESSIONS_PER_AGENT": COUNT,
    "TARGET_UTILISATION": (*SHARE, "0.05"),
    "TEMPLATE_MEMORY_MB": COUNT,
    "TRACE_SHARE": SHARE,
    "TRANSCRIPT_MAX_MB": COUNT,
    "USER_SHARE": (*SHARE, "0"),
    "WORKER_COUNT": COUNT,
    "WORKSPACE_MAX_FILES": COUNT,
    "WORKSPACE_MAX_MB": COUNT,
}


def _manager() -> None:
    asyncio.run(check_manager(ManagerSettings()))


def _gateway() -> None:
    asyncio.run(check_gateway(GatewaySettings()))


def _simulator() -> None:
    check_simulator(SimulatorSettings())


STARTS: dict[type[BaseSettings], Callable[[], object]] = {
    ManagerSettings: _manager,
    GatewaySettings: _gateway,
    AutoscalerSettings: AutoscalerSettings,
    SimulatorSettings: _simulator,
    MonitoringSettings: MonitoringSettings,
}
VARIABLES = {
    (role, f"{role.model_config.get('env_prefix') or ''}{name}".upper())
    for role in STARTS
    for name in role.model_fields
}


def test_every_variable_has_wrong_values() -> None:
    assert set(WRONG) == {name for _, name in VARIABLES}


@pytest.mark.parametrize(
    ("role", "name", "value"),
    [
        pytest.param(role, name, value, id=f"{role.__name__}-{name}={value[:30]!r}")
        for role, name in sorted(VARIABLES, key=lambda pair: (pair[1], pair[0].__name__))
        for value in WRONG.get(name, ())
    ],
)
def test_a_wrong_value_fails_with_one_line_naming_its_variable(
    role: type[BaseSettings],
    name: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.root, "handlers", [])  # those of an earlier test may write to a closed stream
    monkeypatch.setenv("STATE_DIR", str(tmp_path / "state"))
    if name == "JWT_SECRET":
        monkeypatch.setenv("ENABLE_AUTH", "true")
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end, explained():
        STARTS[role]()
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("hypercore-agents: ")]) == 1, lines
    assert name in lines[-1]
    assert "Traceback" not in "".join(lines)
    assert "secret-in-url" not in "".join(lines)


def test_a_wrong_boolean_lists_the_valid_values(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ENABLE_AUTH", "jwt")
    with pytest.raises(SystemExit), explained():
        ManagerSettings(_env_file=None)
    assert capsys.readouterr().err == "hypercore-agents: ENABLE_AUTH: must be true or false\n"
