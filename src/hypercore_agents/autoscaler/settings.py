"""Settings of the autoscaler, from the environment and `.env`. Field names are the variables' names in lower case."""

import re
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings

from hypercore_agents.autoscaler.policy import PolicySettings
from hypercore_agents.http.serve import AddressError, is_loopback, parse_address
from hypercore_agents.kit.environment import SETTINGS


class AutoscalerSettings(BaseSettings):
    """Settings of the autoscaler. Times in seconds, sizes in agents, thresholds as shares of capacity."""

    model_config = SETTINGS

    autoscaler_addr: str = Field(
        default="127.0.0.1:8091", description="address at which the autoscaler serves its decisions and metrics"
    )
    autoscaler_allow_any_address: bool = Field(
        default=False, description="allow an address that other machines can reach; anyone there can read decisions"
    )
    autoscaler_signals: Literal["prometheus", "manager"] = Field(
        default="prometheus", description="source of the signals: prometheus or manager"
    )
    autoscaler_dry_run: bool = Field(default=False, description="compute and log decisions without applying them")
    autoscaler_interval: float = Field(default=5.0, ge=0.1, le=300, description="seconds between decisions")
    autoscaler_timeout: float = Field(
        default=5.0, gt=0, le=60, description="time limit of one request to Prometheus or the manager, in seconds"
    )
    autoscaler_decisions: int = Field(
        default=500, ge=1, le=10_000, description="number of decisions to retain for GET /v1/autoscaler/decisions"
    )
    autoscaler_token: SecretStr | None = Field(
        default=None, description="token for the manager, scope admin; required with ENABLE_AUTH"
    )
    manager_url: str = Field(
        default="http://127.0.0.1:8080", description="URL at which the autoscaler reaches the manager"
    )
    prometheus_url: str = Field(default="http://localhost:9090", description="URL of Prometheus")
    signals_max_age: float = Field(
        default=60.0, ge=1, le=280, description="age in seconds after which a sample is stale"
    )

    min_agents: int = Field(
        default=10,
        ge=0,
        le=10_000,
        description="minimum size of the pool; at least 1, because a pool without agents reports no load",
    )
    max_agents: int = Field(default=1000, ge=1, le=10_000, description="maximum size of the pool")
    target_sessions_per_agent: int = Field(default=100, ge=1, le=1000, description="sessions that fill an agent")
    scale_up_threshold: float = Field(
        default=0.80, gt=0, le=1, description="share of capacity in use above which the pool grows"
    )
    scale_down_threshold: float = Field(
        default=0.30, ge=0, lt=1, description="share of capacity in use below which the pool shrinks"
    )
    target_utilisation: float = Field(
        default=0.70, gt=0, le=1, description="share of capacity in use for which the pool is sized"
    )
    stabilisation_window: float = Field(
        default=60.0,
        ge=0,
        le=3600,
        description="seconds of low load before the pool shrinks below SCALE_DOWN_THRESHOLD",
    )
    consolidation_window: float = Field(
        default=300.0,
        ge=0,
        le=3600,
        description="seconds of low load before the pool shrinks between the thresholds; 0: it does not shrink there",
    )
    panic_window: float = Field(
        default=60.0, ge=0, le=3600, description="seconds without shrinking after the pool was full"
    )
    spawn_seconds: float = Field(
        default=10.0, gt=0, le=300, description="assumed seconds to start an agent until a start is measured"
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="DEBUG, INFO, WARNING or ERROR"
    )
    log_format: Literal["json", "console"] = Field(
        default="json", description="json, or console for reading in a terminal"
    )

    @field_validator("manager_url", "prometheus_url")
    @classmethod
    def _http_url(cls, value: str) -> str:
        if not re.fullmatch(r"https?://[^/\s?#@]+(/[^\s?#]*)?", value):
            raise ValueError("must be http://HOST:PORT or https://HOST:PORT, without user and query")
        return value.rstrip("/")

    @field_validator("autoscaler_token")
    @classmethod
    def _header_value(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9._~+/=-]{1,4096}", value.get_secret_value()):
            raise ValueError("must be one bearer token: letters, digits and ._~+/=-")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.min_agents == 0:
            raise ValueError("MIN_AGENTS=0: a pool without agents reports no load and never grows; set 1 or more")
        if self.min_agents > self.max_agents:
            raise ValueError(f"MIN_AGENTS={self.min_agents} is more than MAX_AGENTS={self.max_agents}; lower it")
        if not self.scale_down_threshold < self.target_utilisation <= self.scale_up_threshold:
            raise ValueError(
                f"SCALE_DOWN_THRESHOLD={self.scale_down_threshold:g} must be below "
                f"TARGET_UTILISATION={self.target_utilisation:g}, and that at most "
                f"SCALE_UP_THRESHOLD={self.scale_up_threshold:g}; otherwise the size of the pool oscillates"
            )
        try:
            host, _ = parse_address(self.autoscaler_addr, "AUTOSCALER_ADDR")
        except AddressError as error:
            raise ValueError(str(error)) from None
        if not self.autoscaler_allow_any_address and not is_loopback(host):
            raise ValueError(
                f"AUTOSCALER_ADDR={self.autoscaler_addr} can be reached from other machines: listen on 127.0.0.1, "
                "or set AUTOSCALER_ALLOW_ANY_ADDRESS=true if only Prometheus and operators can reach it"
            )
        return self

    def policy(self) -> PolicySettings:
        """Return the settings of the policy."""
        return PolicySettings(
            minimum=self.min_agents,
            maximum=self.max_agents,
            sessions_per_agent=self.target_sessions_per_agent,
            scale_up_threshold=self.scale_up_threshold,
            scale_down_threshold=self.scale_down_threshold,
            target_utilisation=self.target_utilisation,
            interval=self.autoscaler_interval,
            spawn_seconds=self.spawn_seconds,
            trend_window=max(20.0, 4 * self.autoscaler_interval),
            panic_window=self.panic_window,
            stabilisation_window=self.stabilisation_window,
            consolidation_window=self.consolidation_window,
            longest_gap=max(30.0, 4 * self.autoscaler_interval),
        )
