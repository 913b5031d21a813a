"""The gateway's settings, from the environment and `.env`, built once in the composition root.

Every name is the variable's in lower case; a value out of range is refused with the variable's name.
"""

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, StringConstraints, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from hypercore_agents.api.options import ModelName
from hypercore_agents.http.serve import AddressError, parse_address
from hypercore_agents.kit.environment import ENCODING, ENV_FILE, default_state_dir
from hypercore_agents.observability.tracing import OtlpEndpoint
from hypercore_agents.store.database import sqlite_url

_Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
_Words = Annotated[tuple[_Word, ...], NoDecode]


class GatewaySettings(BaseSettings):
    """What one gateway process needs to know. Times are in seconds; lists are separated by commas."""

    model_config = SettingsConfigDict(
        env_file=ENV_FILE,
        env_file_encoding=ENCODING,
        extra="ignore",
        hide_input_in_errors=True,
        env_ignore_empty=True,
        allow_inf_nan=False,
    )

    gateway_addr: str = "127.0.0.1:8090"
    gateway_operator_addr: str | None = Field(
        default=None, description="where the gateway shows /health and /metrics; keep it out of sandboxes' reach"
    )
    allow_wildcard_addr: bool = Field(default=False, description="let GATEWAY_ADDR be 0.0.0.0 or [::]")
    state_dir: Path = Field(default_factory=default_state_dir)
    database_url: str | None = Field(default=None, description="default: SQLite in STATE_DIR")
    key_file: Path | None = Field(default=None, description="key ring; default: keys.json in STATE_DIR")

    claude_api_url: str = "https://api.anthropic.com"
    anthropic_api_key: SecretStr | None = Field(
        default=None, description="the platform's key, where none is stored with `keys add --platform`"
    )
    allow_platform_key: bool = Field(
        default=True, description="whether users without a key of their own use the platform's"
    )
    claude_model: ModelName | None = Field(
        default=None, description="for sessions that name no model; unset: any model, chosen by the Claude CLI"
    )
    allowed_models: _Words = Field(
        default=("claude-haiku-",), description="prefixes of models that every session may use besides its own"
    )
    allowed_betas: _Words = Field(default=(), description="betas to let through besides those of the pinned CLI")
    allowed_server_tools: _Words = Field(
        default=(), description="types of API-side tools to let through, such as web_search_20250305"
    )
    model_prices: Path | None = Field(default=None, description="JSON file of prices over the built-in ones")
    model_requests_per_session: int = Field(default=16, ge=1, le=1000, description="at one time")
    model_request_seconds: float = Field(default=3600, gt=0, le=86_400, description="longest model request")

    model_bodies_mb: int = Field(
        default=256, ge=64, le=65_536, description="memory for the bodies of model requests that are being sent, MB"
    )

    blob_url: str | None = Field(
        default=None, description="where workspaces are archived, s3://BUCKET/PREFIX; default: a folder in STATE_DIR"
    )
    workspace_max_mb: int = Field(default=256, ge=1, le=10_240, description="largest archive of a workspace")
    user_storage_mb: int = Field(
        default=10_240, ge=1, le=10_485_760, description="archived workspaces of one user's sessions together, MB"
    )
    transcript_max_mb: int = Field(default=64, ge=1, le=1024, description="largest transcript of a session, MB")

    starts_per_host: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Claude CLIs that start at a time on this machine, over all agents; default: one per processor",
    )

    agent_token_seconds: float = Field(default=3600, ge=10, le=86_400)
    session_token_seconds: float = Field(default=3600, ge=10, le=86_400)

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["json", "console"] = "json"
    otlp_endpoint: OtlpEndpoint | None = Field(
        default=None, description="base URL of a trace collector (OTLP over HTTP); unset: no traces"
    )
    trace_share: float = Field(default=1.0, ge=0, le=1, description="share of traces that are recorded")

    @field_validator("allowed_models", "allowed_betas", "allowed_server_tools", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("anthropic_api_key")
    @classmethod
    def _key_is_a_header_value(cls, value: SecretStr | None) -> SecretStr | None:
        key = value.get_secret_value() if value else "x"
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError("must be printable ASCII characters without spaces")
        return value

    @field_validator("claude_api_url")
    @classmethod
    def _url(cls, value: str) -> str:
        scheme, _, rest = value.partition("://")
        if scheme not in ("http", "https") or not rest or any(mark in rest for mark in "?#@ "):
            raise ValueError("must be http://HOST or https://HOST, without user and query")
        return value.rstrip("/")

    @field_validator("gateway_operator_addr")
    @classmethod
    def _operator_address(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                parse_address(value, "the value")
        except AddressError as error:
            raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _address(self) -> Self:
        try:
            host, _ = parse_address(self.gateway_addr, "GATEWAY_ADDR")
        except AddressError as error:
            raise ValueError(str(error)) from None
        if _is_wildcard(host) and not self.allow_wildcard_addr:
            raise ValueError(
                f"GATEWAY_ADDR={self.gateway_addr} would listen on every network of this machine: set it to the "
                "one address that sandboxes reach, or set ALLOW_WILDCARD_ADDR=true if a firewall sees to that"
            )
        return self

    @property
    def store_url(self) -> str:
        """URL of the store."""
        return self.database_url or sqlite_url(self.state_dir / "store.db")

    @property
    def key_path(self) -> Path:
        """The key ring's file."""
        return self.key_file or self.state_dir / "keys.json"


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
