"""Spawn, list, get, delete and stats of agents, as `POST /v1/agents/spawn` and its neighbours speak them."""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, field_validator

from hypercore_agents.api.ids import UserId
from hypercore_agents.api.names import name_of
from hypercore_agents.api.options import (
    Effort,
    McpServers,
    ModelName,
    OutputSchema,
    PermissionMode,
    PresetPrompt,
    PromptText,
    SessionOptions,
    SkillName,
    Subagent,
    SubagentName,
    Thinking,
    ToolName,
    ToolPattern,
    ToolRules,
    no_remote_or_secret_mcp,
)
from hypercore_agents.api.text import storable

TagKey = Annotated[
    str,
    *name_of(
        r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}", "1 to 63 of letters, digits and ._/-, beginning with a letter or digit"
    ),
]


class AgentState(StrEnum):
    """Where an agent is in its life (docs/ARCHITECTURE.md has the table of transitions)."""

    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class AgentKind(StrEnum):
    """Who an agent serves: everybody (`pool`) or the one user who spawned it (`dedicated`)."""

    POOL = "pool"
    DEDICATED = "dedicated"


class SpawnRequest(BaseModel):
    """Body of `POST /v1/agents/spawn`."""

    model_config = ConfigDict(extra="forbid")

    user_id: UserId
    anthropic_api_key: SecretStr | None = Field(
        default=None,
        description="the user's Claude API key; sealed at once, opened only in the gateway, never given to the agent",
    )
    cores: int = Field(default=4, ge=1, le=32, description="virtual CPUs")
    memory: int = Field(default=8192, ge=128, le=65536, description="MB")
    gpu_quota: int | None = Field(default=None, ge=0, description="GPU memory, MB")
    max_concurrent: int | None = Field(
        default=None, ge=1, le=1000, description="sessions; default `MAX_CONCURRENT_REQUESTS`"
    )
    timeout: int | None = Field(default=None, ge=1, le=3600, description="seconds per turn; default `REQUEST_TIMEOUT`")
    tags: dict[TagKey, Annotated[str, StringConstraints(max_length=256)]] = Field(default_factory=dict, max_length=32)
    system_prompt: PromptText | PresetPrompt | None = None
    model: ModelName | None = None
    fallback_model: ModelName | None = None
    tools: list[ToolName] | None = Field(default=None, max_length=64)
    allowed_tools: ToolRules | None = None
    disallowed_tools: ToolRules | None = None
    permission_mode: PermissionMode | None = None
    mcp_servers: McpServers | None = None
    approval_tools: list[ToolPattern] | None = Field(default=None, max_length=64)
    agents: dict[SubagentName, Subagent] | None = Field(default=None, max_length=16)
    skills: list[SkillName] | None = Field(default=None, max_length=32)
    effort: Effort | None = None
    thinking: Thinking | None = None
    output_schema: OutputSchema | None = None
    max_turns: int | None = Field(default=None, ge=1, le=1000)
    max_budget_usd: float | None = Field(default=None, gt=0, le=1_000_000, allow_inf_nan=False)

    @field_validator("anthropic_api_key")
    @classmethod
    def _key_is_a_header_value(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        key = value.get_secret_value()
        if not 8 <= len(key) <= 512 or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError("must be 8 to 512 printable ASCII characters without spaces")
        return value

    @field_validator("mcp_servers", mode="before")
    @classmethod
    def _mcp_servers(cls, value: Any) -> Any:
        return no_remote_or_secret_mcp(value)

    @field_validator("*")
    @classmethod
    def _storable_values(cls, value: Any) -> Any:
        return storable(value)

    def options(self) -> SessionOptions:
        """Return the session options that this agent gives to its sessions by default."""
        return SessionOptions.model_validate(
            {name: getattr(self, name) for name in SessionOptions.model_fields if hasattr(self, name)}
        )


class AgentView(BaseModel):
    """An agent as its user sees it. Times are ISO 8601 in UTC; `memory` is in MB."""

    agent_id: str
    url: str = Field(description="base URL under which the manager relays to the agent")
    metrics_url: str
    status: AgentState
    created_at: str
    user_id: str
    cores: int
    memory: int
    kind: AgentKind
    backend: str
    isolation: str = Field(description="what keeps this agent apart from the host and from other agents")
    tools: bool = Field(description="whether sessions may use tools here")
    max_concurrent: int
    sessions: int = Field(description="sessions placed on the agent now")
    tags: dict[str, str]
    error: str | None = Field(default=None, description="why the agent failed, when it did")


class AgentList(BaseModel):
    """Answer of `GET /v1/agents/list`."""

    user_id: str | None
    count: int
    agents: list[AgentView]


class AgentDeleted(BaseModel):
    """Answer of `DELETE /v1/agents/delete`."""

    agent_id: str
    status: AgentState


class AgentLoad(BaseModel):
    """Answer of an agent's own `GET /v1/agent/stats`."""

    agent_id: str
    sessions: int = Field(description="sessions placed here")
    live: int = Field(description="sessions with a Claude CLI process")
    running: int = Field(description="turns running now")
    capacity: int = Field(description="sessions that may be placed here")
    live_capacity: int = Field(description="Claude CLI processes at a time")
    memory_mb: int = Field(description="private memory of the server and its Claude CLIs")
    memory_limit_mb: int
    draining: bool
    shares: dict[str, "ShareView"] = Field(
        default_factory=dict,
        description="questions and starts that wait, and Claude processes; users take turns at starts",
    )


class PoolView(BaseModel):
    """The pool's wanted and observed size, in agents."""

    desired: int
    running: int
    starting: int
    draining: int
    sessions: int | None = Field(default=None, description="sessions placed on the pool's agents; absent: not counted")
    spawn_seconds: float | None = Field(
        default=None, description="how long recent starts took (90th percentile); absent: none lately"
    )
    reporting: int = Field(default=0, description="running agents whose heartbeat came within HEALTH_CHECK_INTERVAL")
    live: int = Field(default=0, description="sessions with a Claude CLI process, by heartbeats")
    waiting: int = Field(default=0, description="turns that wait for a process, by heartbeats")
    cpu: float | None = Field(default=None, description="share of their cores that agents use, on average")
    memory: float | None = Field(default=None, description="share of their memory that agents use, on average")
    queue_wait_seconds: float | None = Field(
        default=None,
        description="how long turns of the last minute waited for a process: of each agent the 95th percentile, and of "
        "these the 95th again",
    )
    start_wait_seconds: float | None = Field(
        default=None,
        description="how long starts of Claude CLIs waited for the processors of their agent and host, as above",
    )
    api_headroom: float | None = Field(
        default=None, description="share of the Claude API's rate limit that is left to the platform's key"
    )


class MemoryView(BaseModel):
    """Memory of the host in MB: what is counted when an agent is admitted, and what is really used of it."""

    given_mb: int
    charged_mb: int = Field(description="as the kernel's control groups count it, without file cache")


class HostView(BaseModel):
    """What the backend's host has for agents, how much of it they were given, and what is really free.

    Where a backend limits and does not reserve (`process`), more may be given than there is.
    """

    cores: int = Field(description="with over-commitment")
    cores_used: int
    memory_mb: int
    memory_used_mb: int = Field(description="given to agents and their templates, used by them or not")
    memory_charged_mb: int | None = Field(
        default=None,
        description="really used by agents and their templates, as control groups count it, without file cache; "
        "absent: the backend does not count (all but microvm)",
    )
    agents_memory: dict[str, MemoryView] = Field(
        default_factory=dict, description="of each agent; empty where memory_charged_mb is absent"
    )
    templates_memory: MemoryView | None = Field(
        default=None, description="of the templates from which microVMs start; absent as memory_charged_mb"
    )
    disk_mb: int = Field(default=0, description="for agents' disks")
    disk_used_mb: int = Field(default=0, description="what agents' disks may grow to")
    load: float = Field(default=0.0, description="processors that the whole host wanted over the last minute")
    processors: int = Field(default=0, description="that the host has; 0: not known")
    memory_free_mb: int = Field(default=0, description="of the whole host")
    disk_free_mb: int = Field(default=0, description="of the whole host")


class ShareView(BaseModel):
    """Something that users share, of which each may have so much."""

    limit: int | None = Field(description="what one user may have; null: no limit")
    used: dict[str, int] = Field(description="what users have now; those with the most, at most 20")


class StatsView(BaseModel):
    """Answer of `GET /v1/agents/stats`: counts over live agents (neither stopped nor failed)."""

    total_agents: int
    users: int
    agents_per_user: dict[str, int]
    agents_by_status: dict[str, int]
    pool: PoolView
    sessions: int = Field(description="sessions placed on agents now")
    capacity: int = Field(description="sessions that the running agents can hold")
    shares: dict[str, ShareView] = Field(
        default_factory=dict,
        description="places, sessions and stored_bytes (archived workspaces); event_streams and downloads open at this "
        "manager process",
    )
    host: HostView | None = Field(default=None, description="null: the backend does not count, or cannot look now")
