"""The pool: its desired size (`/v1/pool`), rolls to another configuration, and the autoscaler's decisions.

The size is changed by compare-and-set, so that two writers cannot fight.
"""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from hypercore_agents.api.options import SessionOptions

ImageName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}$")]


class PoolSize(BaseModel):
    """Body of `PUT /v1/pool`, and the answer of both methods.

    In a PUT, `version` is the one that the writer read; the manager answers 409 `conflict` when another write came
    first, and otherwise the new size with its new version. Version 0 means that nobody has set a size yet.
    """

    model_config = ConfigDict(extra="forbid")

    desired: int = Field(ge=0, le=10_000, description="agents")
    version: int = Field(ge=0, description="rises with each change")


class PoolConfig(BaseModel):
    """What every agent of the pool gets: `POOL_CONFIG` and a roll's `config`, with the names of a spawn's body."""

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
    """Body of `POST /v1/pool/roll`. What is absent stays as it is; an empty body replaces every agent by one alike."""

    model_config = ConfigDict(extra="forbid")

    image: ImageName | None = Field(default=None, description="of a backend that has images")
    config: PoolConfig | None = Field(default=None, description="in place of POOL_CONFIG, e.g. {'cores': 2}")
    at_once: int = Field(default=1, ge=1, le=100, description="agents that are replaced at a time")


class RollStatus(StrEnum):
    """Where a roll is. `stopped`: by itself, since new agents did not become ready, or by an operator."""

    ROLLING = "rolling"
    DONE = "done"
    STOPPED = "stopped"


class RollView(BaseModel):
    """A roll and how far it came. Times are Unix seconds."""

    revision: int = Field(description="rises with each roll; an agent is of the revision that it was started for")
    status: RollStatus
    image: str | None
    config: PoolConfig | None
    at_once: int
    updated: int = Field(description="agents of this revision that run")
    starting: int = Field(description="agents of this revision that start")
    remaining: int = Field(description="agents of other revisions that are still there")
    reason: str | None = Field(default=None, description="why it stopped")
    started_at: float
    ended_at: float | None = None


class PoolState(BaseModel):
    """Answer of `GET /v1/pool`: the size to name in a PUT, what is there, and the last roll."""

    desired: int
    version: int
    running: int
    starting: int
    draining: int
    roll: RollView | None = None


class ScalingAction(StrEnum):
    """What a decision does to the pool's size."""

    GROW = "grow"
    SHRINK = "shrink"
    HOLD = "hold"


class ScalingReason(StrEnum):
    """Why a decision is what it is, as a closed list; `ScalingDecision.detail` has the numbers."""

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
    """Why signals cannot be trusted."""

    UNREACHABLE = "unreachable"
    MISSING = "missing"
    STALE = "stale"
    ABSURD = "absurd"


class SizeOutcome(StrEnum):
    """What became of a decision."""

    UNCHANGED = "unchanged"
    APPLIED = "applied"
    DRY_RUN = "dry_run"
    CONFLICT = "conflict"
    FAILED = "failed"


class ScalingDecision(BaseModel):
    """One decision of the autoscaler. Times are Unix seconds; absent figures were not known."""

    at: float
    until: float = Field(description="when the same decision was last taken again")
    times: int = Field(description="how often the same decision was taken in a row")
    action: ScalingAction
    reason: ScalingReason
    outcome: SizeOutcome
    wanted_before: int | None
    desired: int | None
    detail: str
    problem: str | None = Field(default=None, description="what is wrong with the signals or the manager")
    sessions: float | None = None
    expected_sessions: float | None = Field(default=None, description="when an agent ordered now could serve")
    running: int | None = None


class ScalingDecisions(BaseModel):
    """Answer of `GET /v1/autoscaler/decisions`: newest first, the same one after another told once."""

    dry_run: bool
    decisions: list[ScalingDecision]
