"""Settings of the agent server, from the environment that its compute backend sets.

They contain no secrets: the enrolment secret comes over `ENROLMENT_FD`, and all other secrets come from the gateway at
enrolment. Rejected: a `.env` file, because nothing inside a sandbox should be able to configure the sandbox's server.
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from hypercore_agents.api.ids import AgentId
from hypercore_agents.observability.logging import LogFormat

MEMORY_PER_SESSION_MB = 130
"""Private memory of one Claude CLI after twenty turns, with a margin (measured, see docs/ARCHITECTURE.md)."""
MEMORY_OF_SERVER_MB = 300


class AgentSettings(BaseSettings):
    """Settings of one agent server. An invalid value is rejected with the variable's name."""

    model_config = SettingsConfigDict(env_prefix="", extra="ignore", populate_by_name=True)

    agent_id: AgentId = Field(description="id of this agent")
    gateway_url: str = Field(description="http://HOST:PORT of the gateway, the only address that a sandbox can reach")
    agent_state_dir: Path = Field(description="this agent's own folder, which contains its sessions' folders")
    enrolment_fd: int = Field(ge=0, description="descriptor that yields the one-use enrolment secret")
    agent_listen_fd: int | None = Field(default=None, ge=0, description="inherited listening socket")
    agent_host: str = "127.0.0.1"
    agent_port: int = Field(default=8080, ge=0, le=65535)
    metrics_port: int | None = Field(
        default=None, ge=1, le=65535, description="additional port for /metrics, without the manager's bearer"
    )
    max_concurrent_requests: int = Field(default=100, ge=1, le=1000, description="maximum placed sessions")
    live_sessions: int | None = Field(default=None, ge=1, le=1000, description="maximum Claude CLI processes")
    user_share: float = Field(
        default=1.0, gt=0, le=1, description="maximum part of the memory, processes and live sessions for one user"
    )
    spares: int | None = Field(default=None, ge=0, le=100, description="number of prewarmed CLIs")
    park_after: float = Field(default=600.0, gt=0, description="idle time before parking a session, in seconds")
    background_max: float = Field(
        default=600.0, gt=0, le=86400, description="maximum runtime of background processes after a turn, in seconds"
    )
    recycle_mb: int = Field(default=400, ge=100, description="private memory above which an idle CLI is replaced, MB")
    agent_memory_mb: int | None = Field(default=None, ge=64, description="memory of the sandbox, MB")
    agent_cores: int | None = Field(default=None, ge=1, description="virtual CPUs of the sandbox")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    log_format: LogFormat = "json"
    log_content: bool = Field(default=False, description="log prompts and answers")
    tracing: bool = Field(default=False, description="record spans and send them to the gateway")
    drain_grace: float = Field(default=10.0, ge=0, le=600, description="time for running turns at shutdown, in seconds")
    room_timeout: float = Field(
        default=30.0, gt=0, le=600, description="maximum wait of a turn for a CLI process, in seconds"
    )
    workspace_max_mb: int = Field(
        default=256, ge=1, le=10_240, description="maximum size of a workspace archive, in MB"
    )
    workspace_max_files: int = Field(
        default=50_000, ge=1, le=1_000_000, description="maximum files and folders in a workspace archive"
    )
    approval_timeout: float = Field(
        default=120.0, gt=0, le=3000, description="maximum wait of an approval request, in seconds"
    )
    skills_dir: Path = Field(
        default=Path("/opt/hypercore-agents/skills"), description="folder with one folder per skill of the operator"
    )
    enrolment_timeout: float = Field(default=60.0, gt=0, le=600, description="maximum time to enrol, in seconds")
    cli_start_timeout: float = Field(
        default=30.0, gt=0, le=300, description="time without progress before a CLI's start is given up, in seconds"
    )
    interrupt_grace: float = Field(default=5.0, gt=0, le=60, description="time from interrupt to kill, in seconds")
    claude_cli_path: Path | None = Field(
        default=None,
        validation_alias=AliasChoices("CLAUDE_CLI_PATH", "claude_cli_path"),
        description="path of the Claude CLI; default: the CLI bundled with the Agent SDK",
    )

    @field_validator("gateway_url")
    @classmethod
    def _is_an_origin(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")) or value.count("/") > 2 + value.endswith("/"):
            raise ValueError("must be http://HOST:PORT without a path, for example http://127.0.0.1:8090")
        return value.rstrip("/")

    @field_validator("agent_state_dir", "skills_dir")
    @classmethod
    def _is_absolute(cls, value: Path) -> Path:
        if not value.is_absolute():
            raise ValueError("must be an absolute path")
        return value

    def memory_mb(self) -> int:
        """Return the memory that this agent may use, MB; default: all of the machine's."""
        if self.agent_memory_mb is not None:
            return self.agent_memory_mb
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20

    def cores(self) -> int:
        """Return the number of cores that this agent can use, at most those available to its process."""
        available = len(os.sched_getaffinity(0))
        return available if self.agent_cores is None else min(available, self.agent_cores)

    def prewarmed_target(self, live_limit: int) -> int:
        """Return the number of prewarmed CLIs; default: one per core, at most an eighth of the live processes."""
        return self.spares if self.spares is not None else min(self.cores(), live_limit // 8)

    def live_memory_mb(self) -> int:
        """Return the maximum private memory of all CLIs together, MB."""
        return max(MEMORY_PER_SESSION_MB, self.memory_mb() - MEMORY_OF_SERVER_MB)

    def live_limit(self) -> int:
        """Return the maximum number of Claude CLI processes; default: as many as fit into memory."""
        if self.live_sessions is not None:
            return self.live_sessions
        return max(1, min(self._sessions_in_memory(), self.max_concurrent_requests))

    def live_limit_of_user(self) -> int:
        """Return the maximum number of one user's CLI processes: as many as fit into the user's share of memory."""
        return max(1, min(self.live_limit(), int(self._sessions_in_memory() * self.user_share)))

    def _sessions_in_memory(self) -> int:
        return (self.memory_mb() - MEMORY_OF_SERVER_MB) // MEMORY_PER_SESSION_MB
