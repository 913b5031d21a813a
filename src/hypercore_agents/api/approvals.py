"""Approvals: tool calls that wait until a user allows or denies them.

The session option `approval_tools` selects the tools. While an approval request is open, the turn waits. Every user
with access to the session may decide.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from hypercore_agents.api.text import storable

ApprovalOutcome = Literal["allow", "deny", "approval_expired"]
"""`approval_expired`: not decided in time, too many open requests, or the turn ended; the call did not run."""


class ApprovalDecision(BaseModel):
    """Body of `POST /v1/agent/session/{id}/approvals/{approval_id}`."""

    model_config = ConfigDict(extra="forbid")

    decision: Literal["allow", "deny"]
    input: dict[str, Any] | None = Field(
        default=None, description="with `allow`: input for the tool that replaces the model's"
    )
    message: Annotated[str, StringConstraints(max_length=4000)] | None = Field(
        default=None, description="with `deny`: text for the model"
    )

    @field_validator("input", "message")
    @classmethod
    def _storable_values(cls, value: Any) -> Any:
        return storable(value)

    @model_validator(mode="after")
    def _matches_decision(self) -> "ApprovalDecision":
        if self.decision == "deny" and self.input is not None:
            raise ValueError("input is only valid with decision `allow`; remove it, or allow the call")
        if self.decision == "allow" and self.message is not None:
            raise ValueError("message is only valid with decision `deny`; remove it, or deny the call")
        return self


class ApprovalRequest(BaseModel):
    """An open approval request, and the data of the event `approval_request`. Times are ISO 8601 in UTC."""

    approval_id: str
    tool_use_id: str
    name: str = Field(description="name of the tool")
    input: dict[str, Any]
    expires_at: str


class ApprovalResolved(BaseModel):
    """Data of the event `approval_resolved`, and the response to a decision."""

    approval_id: str
    decision: ApprovalOutcome


class ApprovalList(BaseModel):
    """Response of `GET /v1/agent/session/{id}/approvals`: the open requests."""

    session_id: str
    count: int
    approvals: list[ApprovalRequest]
