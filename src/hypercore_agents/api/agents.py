"""Models of `POST /v1/agents/spawn` and of listing, reading, deleting and counting agents."""

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
    *name_of(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}", "1 to 63 letters, digits and ._/-, beginning with a letter or digit"),
]


class AgentState(StrEnum):
    """State of an agent; docs/ARCHITECTURE.md has the table of transitions."""

    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class AgentKind(StrEnum):
    """Whose sessions an agent runs: those of all users (`pool`) or of the user who spawned it (`dedicated`)."""

    POOL = "pool"
    DEDICATED = "dedicated"


class SpawnRequest(BaseModel):
    """Body of `POST /v1/agents/spawn`."""

    model_config = ConfigDict(extra="forbid")

    user_id: UserId
    anthropic_api_key: SecretStr | None = Field(
        default=None,
        description="the user's Claude API key; stored encrypted, decrypted only in the gateway, not sent to agents",
    )
    cores: int = Field(default=4, ge=1, le=32, description="virtual CPUs")
    memory: int = Field(default=8192, ge=128, le=65536, description="MB")
    gpu_quota: int | None = Field(default=None, ge=0, description="GPU memory, MB")
    max_concurrent: int | None = Field(
        default=None, ge=1, le=1000, description="maximum number of sessions; default `MAX_CONCURRENT_REQUESTS`"
    )
    timeout: int | None = Field(
        default=None, ge=1, le=3600, description="maximum duration of a turn, in seconds; default `REQUEST_TIMEOUT`"
    )
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
        """Return the default options of this agent's sessions."""
        return SessionOptions.model_validate(
            {name: getattr(self, name) for name in SessionOptions.model_fields if hasattr(self, name)}
        )


class AgentView(BaseModel):
    """An agent as shown to its user. Times are ISO 8601 in UTC; `memory` is in MB."""

    agent_id: str
    url: str = Field(description="base URL at which the manager relays requests to the agent")
    metrics_url: str
    status: AgentState
    created_at: str
    user_id: str
    cores: int
    memory: int
    kind: AgentKind
    backend: str
    isolation: str = Field(description="how this agent is isolated from the host and from other agents")
    tools: bool = Field(description="whether sessions may use tools on this agent")
    max_concurrent: int
    sessions: int = Field(description="sessions currently placed on the agent")
    tags: dict[str, str]
    error: str | None = Field(default=None, description="why the agent failed; absent if it did not")


class AgentList(BaseModel):
    """Response of `GET /v1/agents/list`."""

    user_id: str | None
    count: int
    agents: list[AgentView]


class AgentDeleted(BaseModel):
    """Response of `DELETE /v1/agents/delete`."""

    agent_id: str
    status: AgentState


class AgentLoad(BaseModel):
    """Response of an agent's `GET /v1/agent/stats`."""

    agent_id: str
    sessions: int = Field(description="sessions placed on this agent")
    live: int = Field(description="sessions with a Claude CLI process")
    running: int = Field(description="running turns")
    capacity: int = Field(description="maximum number of sessions placed on this agent")
    live_capacity: int = Field(description="maximum number of Claude CLI processes")
    memory_mb: int = Field(description="private memory of the agent server and its Claude CLIs, in MB")
    memory_limit_mb: int
    draining: bool
    shares: dict[str, "ShareView"] = Field(
        default_factory=dict,
        description="open approval requests, waiting starts and Claude processes, by user; starts are shared fairly",
    )


class PoolView(BaseModel):
    """Desired and observed size of the pool, in agents."""

    desired: int
    running: int
    starting: int
    draining: int
    sessions: int | None = Field(
        default=None, description="sessions placed on the pool's agents; absent if not counted"
    )
    spawn_seconds: float | None = Field(
        default=None, description="duration of recent starts (90th percentile); absent if there were none"
    )
    reporting: int = Field(default=0, description="running agents with a heartbeat within HEALTH_CHECK_INTERVAL")
    live: int = Field(default=0, description="sessions with a Claude CLI process, from heartbeats")
    waiting: int = Field(default=0, description="turns waiting for a process, from heartbeats")
    cpu: float | None = Field(default=None, description="average share of their cores that agents use")
    memory: float | None = Field(default=None, description="average share of their memory that agents use")
    queue_wait_seconds: float | None = Field(
        default=None,
        description="how long turns of the last minute waited for a process: the 95th percentile of the "
        "agents' 95th percentile",
    )
    start_wait_seconds: float | None = Field(
        default=None,
        description="how long starts of Claude CLIs waited for the CPUs of their agent and host, computed as above",
    )
    api_headroom: float | None = Field(
        default=None, description="remaining share of the Claude API's rate limit for the platform's key"
    )


class MemoryView(BaseModel):
    """Memory of the host in MB: what is reserved when a spawn is admitted, and what is in use."""

    given_mb: int
    charged_mb: int = Field(description="in use according to the kernel's control groups, without file cache")


class HostView(BaseModel):
    """Resources of the backend's host: the total for agents, the part assigned to them, and what is free.

    A backend that limits without reserving (`process`) may assign more than the total.
    """

    cores: int = Field(description="for agents, with overcommitment")
    cores_used: int
    memory_mb: int
    memory_used_mb: int = Field(description="assigned to agents and templates, in use or not")
    memory_charged_mb: int | None = Field(
        default=None,
        description="in use by agents and templates according to control groups, without file cache; "
        "absent for backends that do not measure it (all except microvm)",
    )
    agents_memory: dict[str, MemoryView] = Field(
        default_factory=dict, description="by agent; empty if memory_charged_mb is absent"
    )
    templates_memory: MemoryView | None = Field(
        default=None, description="of the templates that microVMs start from; absent like memory_charged_mb"
    )
    disk_mb: int = Field(default=0, description="for agents' disks")
    disk_used_mb: int = Field(default=0, description="maximum total size of agents' disks")
    load: float = Field(default=0.0, description="load average of the host over the last minute")
    processors: int = Field(default=0, description="CPUs of the host; 0 if unknown")
    memory_free_mb: int = Field(default=0, description="free on the host, all programs included")
    disk_free_mb: int = Field(default=0, description="free on the host, all programs included")


class ShareView(BaseModel):
    """A shared resource with a limit per user."""

    limit: int | None = Field(description="maximum for one user; null: no limit")
    used: dict[str, int] = Field(description="current use by user; the 20 largest")


class StatsView(BaseModel):
    """Response of `GET /v1/agents/stats`: counts over agents that are neither stopped nor failed."""

    total_agents: int
    users: int
    agents_per_user: dict[str, int]
    agents_by_status: dict[str, int]
    pool: PoolView
    sessions: int = Field(description="sessions currently placed on agents")
    capacity: int = Field(description="maximum number of sessions on the running agents")
    shares: dict[str, ShareView] = Field(
        default_factory=dict,
        description="places, sessions and stored_bytes (archived workspaces); event_streams and downloads open in "
        "this manager process",
    )
    host: HostView | None = Field(
        default=None, description="null if the backend does not report it, or could not be reached"
    )
