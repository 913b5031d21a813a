"""Rows of the store for tests."""

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.store import agents

AGENT = agents.AgentRow(
    agent_id="agent-0000000000000001",
    user_id="platform",
    kind=AgentKind.POOL,
    state=AgentState.RUNNING,
    wanted=agents.WANTED_RUNNING,
    backend="process",
    cores=1,
    memory_mb=512,
    gpu_quota_mb=None,
    capacity=3,
    timeout_seconds=300,
    options={"model": "claude-sonnet-4-5"},
    tags={},
    address="http://127.0.0.1:1",
    bearer_sealed=None,
    error=None,
    attempts=0,
    version=0,
    created_at=1.0,
    updated_at=1.0,
    running_at=None,
    ended_at=None,
)
"""A running pool agent with capacity for three sessions."""
