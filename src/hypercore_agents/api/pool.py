"""The pool's desired size (`GET` and `PUT /v1/pool`) and the autoscaler's decisions about it.

The size is changed by compare-and-set, so that two writers cannot fight.
"""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field


class PoolSize(BaseModel):
    """Body of `PUT /v1/pool`, and the answer of both methods.

    In a PUT, `version` is the one that the writer read; the manager answers 409 `conflict` when another write came
    first, and otherwise the new size with its new version. Version 0 means that nobody has set a size yet.
    """

    model_config = ConfigDict(extra="forbid")

    desired: int = Field(ge=0, le=10_000, description="agents")
    version: int = Field(ge=0, description="rises with each change")


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
