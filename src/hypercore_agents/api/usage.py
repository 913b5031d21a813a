"""`GET /v1/usage`: the gateway's ledger, summed by day, user, agent and model."""

from pydantic import BaseModel, Field

from hypercore_agents.api.chat import Usage


class UsageRow(BaseModel):
    """Sum of one day (UTC), user, agent and model. `input_tokens` includes the cache's."""

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
    """Answer of `GET /v1/usage`."""

    user_id: str | None
    total: Usage
    rows: list[UsageRow]
    stored_bytes: int | None = Field(
        default=None, description="archived workspaces of this user's sessions now; null: for all users together"
    )
    stored_bytes_limit: int | None = Field(default=None, description="what they may have (USER_STORAGE_MB)")
