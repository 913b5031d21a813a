"""The manager's settings, read from the environment and `.env` once, in the composition root.

Each field is named after its variable, in lower case. A value out of range is rejected with the variable's name. A
variable that is accepted but has no effect yet causes a warning that it is not enforced; so does one that looks like a
misspelt setting.
"""

import difflib
import ipaddress
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode

from hypercore_agents.api.options import ModelName, SessionOptions
from hypercore_agents.api.pool import PoolConfig
from hypercore_agents.http.serve import AddressError, is_loopback, parse_address
from hypercore_agents.kit.environment import SETTINGS, default_state_dir, from_env_file
from hypercore_agents.kit.linux.session_view import NEVER_EXPOSED
from hypercore_agents.kit.relay.upstream import unused_proxies
from hypercore_agents.observability.tracing import OtlpEndpoint
from hypercore_agents.store.database import sqlite_url

_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/-]+")
"""Paths that need no quoting in a permission rule."""
PLATFORM_USER = "platform"
"""Owner of the pool's agents."""

_DOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")

NOT_ENFORCED: Mapping[str, str] = {
    "AGENT_HOST": "the compute backend chooses where agents listen",
    "AGENT_PORT": "the compute backend chooses where agents listen",
    "HYPERCORE_ADDR": "the hypercore backend is not available yet",
    "METRICS_PORT": "the manager serves /metrics on LISTEN_ADDR",
    "REDIS_DB": "Redis is not used yet",
    "REDIS_HOST": "Redis is not used yet",
    "REDIS_PASSWORD": "Redis is not used yet",
    "REDIS_PORT": "Redis is not used yet",
    "REDIS_URL": "Redis is not used yet",
    "REGISTRY_URL": "the hypercore backend is not available yet",
}
"""Variables that are accepted but have no effect yet, with the reason."""

_OF_OTHER_ROLES = frozenset({
    "AGENT_TOKEN_SECONDS", "ALLOWED_BETAS", "ALLOWED_MODELS", "ALLOWED_SERVER_TOOLS", "ALLOW_PLATFORM_KEY",
    "ALLOW_WILDCARD_ADDR", "ANTHROPIC_API_KEY", "AUTOSCALER_ADDR", "AUTOSCALER_ALLOW_ANY_ADDRESS",
    "AUTOSCALER_DECISIONS", "AUTOSCALER_DRY_RUN", "AUTOSCALER_INTERVAL", "AUTOSCALER_SIGNALS", "AUTOSCALER_TIMEOUT",
    "AUTOSCALER_TOKEN", "CLAUDE_API_URL", "CONSOLIDATION_WINDOW", "ALERTMANAGER_URL",
    "GATEWAY_OPERATOR_ADDR", "MANAGER_URL", "MODEL_PRICES",
    "MODEL_REQUESTS_PER_SESSION", "MODEL_REQUEST_SECONDS", "PANIC_WINDOW", "SCALE_DOWN_THRESHOLD",
    "SCALE_UP_THRESHOLD", "SESSION_TOKEN_SECONDS", "SIGNALS_MAX_AGE", "SPAWN_SECONDS", "STABILISATION_WINDOW",
    "STARTS_PER_HOST",
    "TARGET_SESSIONS_PER_AGENT", "TARGET_UTILISATION",
})  # fmt: skip


class ManagerSettings(BaseSettings):
    """Settings of one manager process. Times are in seconds."""

    model_config = SETTINGS

    listen_addr: str = Field(
        default="127.0.0.1:8080",
        description="address of the manager; an address that other machines can reach needs ENABLE_AUTH",
    )
    worker_count: int = Field(default=1, ge=1, le=64, description="number of manager processes that serve LISTEN_ADDR")
    base_domain: str | None = Field(
        default=None, description="agents are served as AGENT_ID.<BASE_DOMAIN>; unset: under /agents/AGENT_ID"
    )
    gateway_addr: str = Field(
        default="127.0.0.1:8090", description="address of the gateway, the only one that sandboxes reach"
    )
    gateway_url: str | None = Field(default=None, description="URL at which sandboxes reach the gateway")
    state_dir: Path = Field(
        default_factory=default_state_dir,
        description="folder of the database, keys, sandboxes and logs; default: .hypercore-agents in the home folder",
    )
    database_url: str | None = Field(default=None, description="URL of the store; default: SQLite in STATE_DIR")
    key_file: Path | None = Field(default=None, description="file of the key ring; default: keys.json in STATE_DIR")
    compute_backend: Literal["process", "microvm", "hypercore"] = Field(
        default="process", description="where agents run: process or microvm"
    )
    cpu_overcommit: float = Field(
        default=8, gt=0, le=1000, description="microvm: agents' cores allocated per core of the host"
    )
    microvm_memory_mb: int | None = Field(
        default=None, ge=512, description="microvm: the host's memory available to agents, in MB; unset: all"
    )
    microvm_accelerator: Literal["auto", "kvm", "tcg"] = Field(
        default="auto", description="microvm: auto uses KVM if a probe succeeds"
    )
    template_memory_mb: int = Field(
        default=4096,
        ge=0,
        le=1_048_576,
        description="microvm: memory of all templates together, in MB; 0: every agent boots",
    )
    scratch_mb: int = Field(default=4096, ge=64, le=1_048_576, description="microvm: disk of each agent, in MB")
    boot_timeout: float | None = Field(
        default=None,
        gt=0,
        le=3600,
        description="microvm: seconds after which a boot is retried; default 20, 60 without KVM",
    )
    session_disk_mb: int = Field(
        default=1024, ge=64, le=1_048_576, description="process: disk limit of each session, in MB"
    )
    prometheus_url: str = Field(
        default="http://localhost:9090",
        description="URL of Prometheus; if set, /health checks it and the autoscaler reads its signals there",
    )

    min_agents: int = Field(default=10, ge=0, le=10_000, description="minimum number of agents in the pool")
    max_agents: int = Field(default=1000, ge=1, le=10_000, description="maximum number of agents in the pool")
    places_per_user: float = Field(
        default=0.8, gt=0, le=1, description="share of the pool's places that one user's sessions may hold"
    )
    max_sessions_per_user: int = Field(
        default=10_000,
        ge=0,
        le=10_000_000,
        description="maximum sessions of a user that have not ended, including unplaced ones; 0: no limit",
    )
    user_storage_mb: int = Field(
        default=10_240,
        ge=1,
        le=10_485_760,
        description="maximum size of the workspace archives of one user's sessions together, in MB",
    )
    max_event_streams_per_user: int = Field(
        default=100, ge=0, le=100_000, description="open event streams of one user per manager process; 0: no limit"
    )
    max_downloads_per_user: int = Field(
        default=16, ge=0, le=100_000, description="open downloads of one user per manager process; 0: no limit"
    )
    max_agents_per_user: int = Field(
        default=50, ge=0, le=10_000, description="maximum number of dedicated agents of one user"
    )
    rate_limit_per_minute: int = Field(
        default=100, ge=0, le=1_000_000, description="turns and spawns of one user per minute; 0: no limit"
    )
    rate_limit_per_hour: int = Field(
        default=1000, ge=0, le=10_000_000, description="turns and spawns of one user per hour; 0: no limit"
    )
    max_concurrent_requests: int = Field(
        default=100, ge=1, le=1000, description="maximum number of sessions placed on an agent"
    )
    skills_dir: Path | None = Field(
        default=None, description="folder with one folder per skill; sessions enable skills by name"
    )
    exposed_paths: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(),
        description="process: paths that sessions may read in addition to the system's, separated by colons",
    )
    pool_config: PoolConfig = Field(
        default_factory=PoolConfig,
        description="configuration of the pool's agents, as JSON with the fields of a spawn's body, "
        'e.g. {"cores": 2, "memory": 4096, "system_prompt": "..."}',
    )
    start_timeout: float = Field(
        default=60, gt=0, le=3600, description="seconds within which a started agent must be ready"
    )
    stop_grace: float = Field(
        default=30,
        ge=0,
        le=600,
        description="seconds for an agent to shut down by itself; running turns get all but the last 20 s of it",
    )
    drain_timeout: float = Field(
        default=60,
        ge=0,
        le=3600,
        description="maximum wait for running turns when an agent of the pool drains, in seconds",
    )
    health_check_interval: float = Field(
        default=30, ge=1, le=3600, description="seconds between two checks of a running agent"
    )
    starts_at_once: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="maximum number of agents that start at a time; default: two per core of this machine",
    )
    stop_agents_on_exit: bool = Field(
        default=False, description="stop all agents when the manager ends; `up` sets it to true"
    )

    claude_model: ModelName | None = Field(
        default=None, description="model of sessions that specify none; unset: the Claude CLI's default"
    )
    default_max_tokens: int | None = Field(
        default=None, ge=1, le=1_000_000, description="maximum output tokens of a turn that does not set max_tokens"
    )
    default_temperature: float | None = Field(
        default=None, ge=0, le=1, description="temperature of a turn that does not set one"
    )
    request_timeout: int = Field(default=300, ge=1, le=3600, description="maximum duration of a turn, in seconds")
    allow_unisolated_tools: bool = Field(
        default=False, description="offer tools even if the backend does not isolate sessions from each other"
    )
    workspace_max_mb: int = Field(
        default=256, ge=1, le=10_240, description="maximum size of a workspace archive, in MB"
    )
    workspace_max_files: int = Field(
        default=50_000, ge=1, le=1_000_000, description="maximum number of files and folders in a workspace archive"
    )
    place_ttl: float = Field(
        default=600.0,
        ge=0,
        description="seconds after which an idle session of the pool is unplaced; 0: never",
    )
    session_ttl: float = Field(
        default=30 * 86400.0, ge=0, description="seconds after which an unused session is deleted; 0: never"
    )
    ended_agents_ttl: float = Field(
        default=30 * 86400.0, ge=0, description="seconds for which an ended agent's row is retained; 0: unlimited"
    )
    ended_sessions_ttl: float = Field(
        default=30 * 86400.0, ge=0, description="seconds for which an ended session's row is retained; 0: unlimited"
    )
    ledger_ttl: float = Field(
        default=400 * 86400.0, ge=0, description="seconds for which usage is retained, in whole days; 0: unlimited"
    )
    blob_url: str | None = Field(
        default=None,
        description="where workspace archives are stored, s3://BUCKET/PREFIX or file:///PATH; "
        "default: a folder in STATE_DIR",
    )
    approval_timeout: float = Field(
        default=120.0, gt=0, le=3000, description="maximum seconds that a tool call waits for its user's decision"
    )
    user_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="share of a pool agent's memory, processes and live sessions that one user's sessions may use",
    )
    live_sessions: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="maximum number of live sessions of an agent, each with a Claude CLI process",
    )
    park_after: float = Field(
        default=600.0, gt=0, le=86400, description="seconds after which an idle session's Claude CLI process is ended"
    )
    background_max: float = Field(
        default=600.0,
        ge=1,
        le=86400,
        description="maximum runtime of background processes after a turn, in seconds",
    )

    enable_auth: bool = Field(
        default=False, description="require bearer tokens (`hypercore-agents tokens`) or JWTs on every request"
    )
    jwt_secret: SecretStr | None = Field(
        default=None, description="secret of JWTs (HS256), at least 32 bytes; for example: openssl rand -hex 32"
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="DEBUG, INFO, WARNING or ERROR"
    )
    log_format: Literal["json", "console"] = Field(
        default="json", description="json, or console for reading in a terminal"
    )
    log_content: bool = Field(default=False, description="log prompts and answers in the agents' logs")
    otlp_endpoint: OtlpEndpoint | None = Field(
        default=None, description="base URL of a trace collector (OTLP over HTTP); unset: no traces"
    )
    trace_share: float = Field(default=1.0, ge=0, le=1, description="share of traces that are recorded")

    @field_validator("listen_addr", "gateway_addr")
    @classmethod
    def _address(cls, value: str) -> str:
        try:
            parse_address(value, "the value")
        except AddressError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("exposed_paths", mode="before")
    @classmethod
    def _split_paths(cls, value: Any) -> Any:
        return tuple(filter(None, value.split(":"))) if isinstance(value, str) else value

    @field_validator("exposed_paths")
    @classmethod
    def _exposed(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        for path in value:
            if not path.is_absolute() or not path.exists():
                raise ValueError(f"{path} is not the absolute path of a file or folder that exists; write PATH:PATH")
            if str(path.resolve()) in NEVER_EXPOSED:
                raise ValueError(
                    f"{path} cannot be exposed to sessions as a whole; name the folders in it that they need"
                )
        return value

    @field_validator("skills_dir")
    @classmethod
    def _skills(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        found = value.resolve()
        if not found.is_dir() or not _PLAIN_PATH.fullmatch(str(found)):
            raise ValueError("must be an existing folder whose path has only letters, digits and ._-/")
        return found

    @field_validator("gateway_url", "prometheus_url")
    @classmethod
    def _http_url(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^/\s?#@]+(/[^\s?#]*)?", value):
            raise ValueError("must be http://HOST:PORT or https://HOST:PORT, without user and query")
        return value.rstrip("/") if value else value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("base_domain")
    @classmethod
    def _domain(cls, value: str | None) -> str | None:
        if value is None:
            return None
        lowered = value.lower().strip(".")
        if not _DOMAIN.fullmatch(lowered) or _is_address(lowered):
            raise ValueError("must be a domain name such as agents.example.com")
        return lowered

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.min_agents > self.max_agents:
            raise ValueError(f"MIN_AGENTS={self.min_agents} is more than MAX_AGENTS={self.max_agents}; lower it")
        if self.enable_auth and (self.jwt_secret is None or len(self.jwt_secret.get_secret_value().encode()) < 32):
            raise ValueError("ENABLE_AUTH needs JWT_SECRET, at least 32 bytes; for example: openssl rand -hex 32")
        host, _ = parse_address(self.listen_addr, "LISTEN_ADDR")
        if not self.enable_auth and not is_loopback(host):
            raise ValueError(
                f"LISTEN_ADDR={self.listen_addr} can be reached from other machines and authentication is off: "
                "set ENABLE_AUTH=true and JWT_SECRET, or listen on 127.0.0.1"
            )
        return self

    @property
    def store_url(self) -> str:
        """URL of the store."""
        return self.database_url or sqlite_url(self.state_dir / "store.db")

    @property
    def key_path(self) -> Path:
        """File of the key ring."""
        return self.key_file or self.state_dir / "keys.json"

    @property
    def sandbox_gateway_url(self) -> str:
        """Base URL at which sandboxes and this process reach the gateway."""
        return self.gateway_url or f"http://{self.gateway_addr}"

    @property
    def backend_options(self) -> dict[str, object]:
        """Options of the compute backend."""
        if self.compute_backend == "process":
            return {"exposed": self.exposed_paths, "session_disk_mb": self.session_disk_mb}
        if self.compute_backend != "microvm":
            return {}
        return {
            "cpu_overcommit": self.cpu_overcommit,
            "memory_mb": self.microvm_memory_mb,
            "accelerator": self.microvm_accelerator,
            "template_memory_mb": self.template_memory_mb,
            "scratch_mb": self.scratch_mb,
            "boot_seconds": self.boot_timeout,
            # A manager that ends its agents removes its templates; one that is killed leaves them to its successor.
            "end_templates_on_close": self.stop_agents_on_exit,
        }

    @property
    def prometheus_is_configured(self) -> bool:
        """Whether `PROMETHEUS_URL` is set; only then does `/health` report on Prometheus."""
        return "prometheus_url" in self.model_fields_set

    def platform_options(self) -> SessionOptions:
        """Return the session options that apply if neither the request nor the agent sets them."""
        return SessionOptions(model=self.claude_model)


KNOWN = frozenset({name.upper() for name in ManagerSettings.model_fields} | set(NOT_ENFORCED) | _OF_OTHER_ROLES)
"""Every variable that any role reads or accepts."""


def warnings_about(environment: Mapping[str, str], env_file: Path | None = None) -> list[str]:
    """Return warnings: variables without effect yet, and variables that look like misspelt settings."""
    names = set(environment)
    if env_file is not None and env_file.is_file():
        names |= set(from_env_file(env_file))
    found = [f"{name} is not enforced: {NOT_ENFORCED[name]}" for name in sorted(names & set(NOT_ENFORCED))]
    for name, meant in _misspelt(names - KNOWN, KNOWN):
        found.append(f"{name} is not a setting and has no effect; did you mean {meant}?")
    return found + unused_proxies(environment)


def _misspelt(names: Iterable[str], known: Iterable[str]) -> list[tuple[str, str]]:
    candidates = sorted(known)
    close = ((name, difflib.get_close_matches(name.upper(), candidates, n=1, cutoff=0.85)) for name in sorted(names))
    return [(name, matches[0]) for name, matches in close if matches]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
