"""The gateway's settings, read from the environment and `.env` once, in the composition root.

Each field is named after its variable, in lower case. A value out of range is rejected with the variable's name.
"""

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, StringConstraints, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode

from hypercore_agents.api.options import ModelName
from hypercore_agents.http.serve import AddressError, parse_address
from hypercore_agents.kit.environment import SETTINGS, default_state_dir
from hypercore_agents.observability.tracing import OtlpEndpoint
from hypercore_agents.store.database import sqlite_url

_Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
_Words = Annotated[tuple[_Word, ...], NoDecode]


class GatewaySettings(BaseSettings):
    """Settings of one gateway process. Times are in seconds; lists are separated by commas."""

    model_config = SETTINGS

    gateway_addr: str = Field(
        default="127.0.0.1:8090", description="address of the gateway, the only one that sandboxes reach"
    )
    gateway_operator_addr: str | None = Field(
        default=None,
        description="address at which the gateway serves /health and /metrics; sandboxes must not reach it",
    )
    allow_wildcard_addr: bool = Field(default=False, description="allow a GATEWAY_ADDR of 0.0.0.0 or [::]")
    state_dir: Path = Field(
        default_factory=default_state_dir,
        description="folder of the database, keys, sandboxes and logs; default: .hypercore-agents in the home folder",
    )
    database_url: str | None = Field(default=None, description="URL of the store; default: SQLite in STATE_DIR")
    key_file: Path | None = Field(default=None, description="file of the key ring; default: keys.json in STATE_DIR")

    claude_api_url: str = Field(default="https://api.anthropic.com", description="base URL of the Claude API")
    anthropic_api_key: SecretStr | None = Field(
        default=None,
        description="the platform's Claude API key, used if none is stored with `hypercore-agents keys add --platform`",
    )
    allow_platform_key: bool = Field(
        default=True, description="use the platform's key for users without a key of their own"
    )
    claude_model: ModelName | None = Field(
        default=None, description="model of sessions that specify none; unset: the Claude CLI's default"
    )
    allowed_models: _Words = Field(
        default=("claude-haiku-",),
        description="prefixes of the models that every session may use in addition to its own, separated by commas",
    )
    allowed_betas: _Words = Field(
        default=(),
        description="Claude API betas to allow in addition to those of the pinned Claude CLI, separated by commas",
    )
    allowed_server_tools: _Words = Field(
        default=(),
        description="types of tools run by the Claude API to allow, separated by commas; e.g. web_search_20250305",
    )
    model_prices: Path | None = Field(
        default=None, description="JSON file of model prices that override or extend the built-in ones"
    )
    model_requests_per_session: int = Field(
        default=16, ge=1, le=1000, description="maximum number of concurrent model requests of a session"
    )
    model_request_seconds: float = Field(
        default=3600, gt=0, le=86_400, description="maximum duration of a model request, in seconds"
    )

    model_bodies_mb: int = Field(
        default=256, ge=64, le=65_536, description="memory for the bodies of model requests being sent, in MB"
    )

    blob_url: str | None = Field(
        default=None,
        description="where workspace archives are stored, s3://BUCKET/PREFIX or file:///PATH; "
        "default: a folder in STATE_DIR",
    )
    workspace_max_mb: int = Field(
        default=256, ge=1, le=10_240, description="maximum size of a workspace archive, in MB"
    )
    user_storage_mb: int = Field(
        default=10_240,
        ge=1,
        le=10_485_760,
        description="maximum size of the workspace archives of one user's sessions together, in MB",
    )
    transcript_max_mb: int = Field(
        default=64, ge=1, le=1024, description="maximum size of a session's stored transcript, in MB"
    )

    starts_per_host: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Claude CLIs that may start at a time on the gateway's machine, over all of its agents; default: "
        "one per processor; agents on other machines limit themselves",
    )

    agent_token_seconds: float = Field(
        default=3600, ge=10, le=86_400, description="lifetime of an agent token, in seconds"
    )
    session_token_seconds: float = Field(
        default=3600, ge=10, le=86_400, description="lifetime of a session token, in seconds"
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="DEBUG, INFO, WARNING or ERROR"
    )
    log_format: Literal["json", "console"] = Field(
        default="json", description="json, or console for reading in a terminal"
    )
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
                f"GATEWAY_ADDR={self.gateway_addr} listens on every network of this machine: set it to the one "
                "address that sandboxes reach, or set ALLOW_WILDCARD_ADDR=true if a firewall blocks the others"
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


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
