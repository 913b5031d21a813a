"""`GET /v1/usage`: the gateway's ledger, summed by day, user, agent and model."""

from pydantic import BaseModel, Field

from hypercore_agents.api.chat import Usage


class UsageRow(BaseModel):
    """Sum for one day (UTC), user, agent and model. `input_tokens` includes cache tokens."""

    day: str = Field(description="YYYY-MM-DD, UTC")
    user_id: str
    agent_id: str
    model: str
    requests: int
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_creation_tokens: int
    cost_usd: float


class UsageReport(BaseModel):
    """Response of `GET /v1/usage`."""

    user_id: str | None
    total: Usage
    rows: list[UsageRow]
    stored_bytes: int | None = Field(
        default=None, description="current size of this user's archived workspaces; null in a report for all users"
    )
    stored_bytes_limit: int | None = Field(default=None, description="maximum for this user (USER_STORAGE_MB)")
