"""The simulator's settings: flags of `hypercore-agents simulator`, or `SIMULATOR_*` variables."""

from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from hypercore_agents.http.serve import AddressError, parse_address
from hypercore_agents.kit.environment import SETTINGS
from hypercore_agents.simulator.directives import MOST_RATE, MOST_SECONDS, MOST_TOKENS, parse_fault
from hypercore_agents.simulator.failures import ApiFailure


class SimulatorSettings(BaseSettings):
    """How the simulator listens, answers, fails and records. Nothing here is a secret."""

    model_config = SettingsConfigDict(**SETTINGS, env_prefix="SIMULATOR_", frozen=True)

    listen: str = Field(default="127.0.0.1:8099", description="HOST:PORT; port 0 takes a free one")
    allow_any_address: bool = Field(
        default=False, description="allow an address that other machines reach; anybody there may then use it"
    )
    workers: int = Field(default=1, ge=1, le=64, description="processes that serve; 10,000 streams want 2 or more")
    api_keys_file: Path | None = Field(
        default=None, description="accepted API keys, one a line; unset: any key that is not empty"
    )
    ttft: float = Field(default=0.0, ge=0, le=MOST_SECONDS, description="seconds to the first token")
    rate: float = Field(default=0.0, ge=0, le=MOST_RATE, description="tokens per second; 0: all at once")
    tokens: int | None = Field(
        default=None, ge=1, le=MOST_TOKENS, description="length of default answers, in tokens; unset: as it comes"
    )
    fault: str | None = Field(
        default=None, description="fail every request, as `[[fault ...]]` would: `529 times=2`, `cut after=5`, `hang`"
    )
    hang_limit: float = Field(default=600.0, gt=0, le=86_400, description="seconds after which a hang is cut")
    record: bool = Field(default=True, description="keep requests for GET /simulator/requests; off for load tests")
    record_bytes: int = Field(
        default=64 * 1024 * 1024, ge=65_536, description="disk that recorded requests may take, in bytes"
    )
    state_dir: Path | None = Field(
        default=None, description="where workers share their state; unset: a temporary directory, removed at the end"
    )
    grace: float = Field(default=2.0, ge=0, le=600, description="seconds that open streams get to end at SIGTERM")

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
