"""The simulator's settings: flags of `hypercore-agents simulator`, or `SIMULATOR_*` variables."""

from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from hypercore_agents.http.serve import AddressError, parse_address
from hypercore_agents.kit.environment import SETTINGS
from hypercore_agents.simulator.directives import MOST_RATE, MOST_SECONDS, MOST_TOKENS, parse_fault
from hypercore_agents.simulator.failures import ApiFailure


class SimulatorSettings(BaseSettings):
    """Settings for listening, answers, faults and recording. None is a secret."""

    model_config = SettingsConfigDict(**SETTINGS, env_prefix="SIMULATOR_", frozen=True)

    listen: str = Field(default="127.0.0.1:8099", description="HOST:PORT to listen on; port 0 selects a free port")
    allow_any_address: bool = Field(
        default=False, description="allow addresses other than loopback; the simulator is then open to other machines"
    )
    workers: int = Field(default=1, ge=1, le=64, description="serving processes; use 2 or more for 10,000 streams")
    api_keys_file: Path | None = Field(
        default=None, description="file with the accepted API keys, one per line; unset: any non-empty key"
    )
    ttft: float = Field(default=0.0, ge=0, le=MOST_SECONDS, description="seconds to the first token")
    rate: float = Field(default=0.0, ge=0, le=MOST_RATE, description="tokens per second; 0: no pacing")
    tokens: int | None = Field(
        default=None,
        ge=1,
        le=MOST_TOKENS,
        description="length of default answers, in tokens; unset: not padded",
    )
    fault: str | None = Field(
        default=None, description="fail every request as `[[fault ...]]` does: `529 times=2`, `cut after=5`, `hang`"
    )
    hang_limit: float = Field(default=600.0, gt=0, le=86_400, description="seconds until a hanging request is closed")
    record: bool = Field(default=True, description="record requests for GET /simulator/requests; off for load tests")
    record_bytes: int = Field(
        default=64 * 1024 * 1024, ge=65_536, description="maximum disk usage of recorded requests, in bytes"
    )
    state_dir: Path | None = Field(
        default=None, description="folder for the state that workers share; unset: a temporary folder, removed at exit"
    )
    grace: float = Field(default=2.0, ge=0, le=600, description="seconds that open streams have to end after SIGTERM")

    @field_validator("listen")
    @classmethod
    def _address(cls, value: str) -> str:
        try:
            parse_address(value, "the value")
        except AddressError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("fault")
    @classmethod
    def _fault_is_readable(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_fault(value)
            except ApiFailure as error:
                raise ValueError(error.message) from error
        return value
