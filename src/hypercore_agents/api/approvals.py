"""Questions to the user: a tool call that waits until somebody allows or denies it.

They come from the session option `approval_tools`; while one waits, the turn waits. Whoever may see the session may
answer.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from hypercore_agents.api.text import storable

ApprovalOutcome = Literal["allow", "deny", "approval_expired"]
"""`approval_expired`: nobody answered in time, too many questions wait, or the turn ended; the call did not run."""


class ApprovalDecision(BaseModel):
    """Body of `POST /v1/agent/session/{id}/approvals/{approval_id}`."""

    model_config = ConfigDict(extra="forbid")

    decision: Literal["allow", "deny"]
    input: dict[str, Any] | None = Field(default=None, description="with `allow`: what the tool gets instead")
    message: Annotated[str, StringConstraints(max_length=4000)] | None = Field(
        default=None, description="with `deny`: what the model is told"
    )

    @field_validator("input", "message")
    @classmethod
    def _storable_values(cls, value: Any) -> Any:
        return storable(value)

    @model_validator(mode="after")
    def _goes_together(self) -> "ApprovalDecision":
        if self.decision == "deny" and self.input is not None:
            raise ValueError("input goes with decision `allow`; leave it out, or allow the call")
        if self.decision == "allow" and self.message is not None:
            raise ValueError("message goes with decision `deny`; leave it out, or deny the call")
        return self


class ApprovalRequest(BaseModel):
    """A question that waits, and the data of a stream's `approval_request`. Times are ISO 8601 in UTC."""

    approval_id: str
    tool_use_id: str
    name: str = Field(description="of the tool")
    input: dict[str, Any]
    expires_at: str


class ApprovalResolved(BaseModel):
    """Data of `approval_resolved`, and the answer to a decision."""

    approval_id: str
    decision: ApprovalOutcome


class ApprovalList(BaseModel):
    """Answer of `GET /v1/agent/session/{id}/approvals`: what waits now."""

    session_id: str
    count: int
    approvals: list[ApprovalRequest]
