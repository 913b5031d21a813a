"""The pool: its desired size (`/v1/pool`), rolls to another configuration, and the autoscaler's decisions.

The size is changed by compare-and-set, so concurrent writers cannot overwrite each other's changes.
"""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from hypercore_agents.api.options import SessionOptions

ImageName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}$")]


class PoolSize(BaseModel):
    """Body of `PUT /v1/pool`, and the response of both methods.

    In a PUT, `version` is the one that was read. If another write came first, the response is 409 `conflict`; otherwise
    it is the new size with its new version. Version 0 means that no size has been set.
    """

    model_config = ConfigDict(extra="forbid")

    desired: int = Field(ge=0, le=10_000, description="agents")
    version: int = Field(ge=0, description="increases with each change")


class PoolConfig(BaseModel):
    """Configuration of the pool's agents: `POOL_CONFIG` and a roll's `config`, with the field names of a spawn."""

    model_config = ConfigDict(extra="forbid")

    cores: int = Field(default=4, ge=1, le=32)
    memory: int = Field(default=8192, ge=128, le=65536, description="MB")
    options: SessionOptions = Field(default_factory=SessionOptions)

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "options" in value:
            return value
        size = {name: value[name] for name in ("cores", "memory") if name in value}
        return {**size, "options": {name: item for name, item in value.items() if name not in size}}


class RollRequest(BaseModel):
    """Body of `POST /v1/pool/roll`. Absent fields do not change; an empty body replaces agents with identical ones."""

    model_config = ConfigDict(extra="forbid")

    image: ImageName | None = Field(default=None, description="image of the new agents, for backends with images")
    config: PoolConfig | None = Field(default=None, description="replaces POOL_CONFIG, for example {'cores': 2}")
    at_once: int = Field(default=1, ge=1, le=100, description="number of agents that are replaced at the same time")


class RollStatus(StrEnum):
    """Status of a roll. `stopped`: because new agents did not become ready, or by an operator."""

    ROLLING = "rolling"
    DONE = "done"
    STOPPED = "stopped"


class RollView(BaseModel):
    """A roll and its progress. Times are Unix seconds."""

    revision: int = Field(description="increases with each roll; an agent has the revision that it was started for")
    status: RollStatus
    image: str | None
    config: PoolConfig | None
    at_once: int
    updated: int = Field(description="running agents of this revision")
    starting: int = Field(description="starting agents of this revision")
    remaining: int = Field(description="remaining agents of other revisions")
    reason: str | None = Field(default=None, description="why the roll stopped")
    started_at: float
    ended_at: float | None = None


class PoolState(BaseModel):
    """Response of `GET /v1/pool`: desired size and version, observed size, and the last roll."""

    desired: int
    version: int
    running: int
    starting: int
    draining: int
    roll: RollView | None = None


class ScalingAction(StrEnum):
    """Effect of a decision on the pool's size."""

    GROW = "grow"
    SHRINK = "shrink"
    HOLD = "hold"


class ScalingReason(StrEnum):
    """Reason for a decision, from a closed list; `ScalingDecision.detail` has the numbers."""

    STEADY = "steady"
    LOAD = "load"
    TREND = "trend"
    PANIC = "panic"
    PRESSURE = "pressure"
    SATURATED = "saturated"
    IDLE = "idle"
    CONSOLIDATION = "consolidation"
    STABILISING = "stabilising"
    BOUNDS = "bounds"
    NO_DATA = "no_data"


class SignalProblem(StrEnum):
    """Why signals cannot be used."""

    UNREACHABLE = "unreachable"
    MISSING = "missing"
    STALE = "stale"
    ABSURD = "absurd"


class SizeOutcome(StrEnum):
    """Result of a decision."""

    UNCHANGED = "unchanged"
    APPLIED = "applied"
    DRY_RUN = "dry_run"
    CONFLICT = "conflict"
    FAILED = "failed"


class ScalingDecision(BaseModel):
    """One decision of the autoscaler. Times are Unix seconds; absent figures were unknown."""

    at: float
    until: float = Field(description="when the same decision was last repeated")
    times: int = Field(description="how many times in a row the decision was made")
    action: ScalingAction
    reason: ScalingReason
    outcome: SizeOutcome
    wanted_before: int | None
    desired: int | None
    detail: str
    problem: str | None = Field(default=None, description="problem with the signals or the manager")
    sessions: float | None = None
    expected_sessions: float | None = Field(
        default=None, description="sessions expected when an agent that is started now becomes ready"
    )
    running: int | None = None


class ScalingDecisions(BaseModel):
    """Response of `GET /v1/autoscaler/decisions`: newest first; repeated decisions are listed once."""

    dry_run: bool
    decisions: list[ScalingDecision]
