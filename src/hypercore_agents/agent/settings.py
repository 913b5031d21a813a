"""Settings of the agent server, from the environment that its compute backend hands to it.

None of them is a secret: the enrolment secret comes over `ENROLMENT_FD`, everything else that is secret comes from
the gateway at enrolment. Rejected: a `.env` file, because nothing inside a sandbox should be able to configure the
server that holds its sessions.
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from hypercore_agents.api.ids import AgentId
from hypercore_agents.observability.logging import LogFormat

MEMORY_PER_SESSION_MB = 130
"""Private memory of one Claude CLI after twenty turns, with margin (measured, see docs/ARCHITECTURE.md)."""
MEMORY_OF_SERVER_MB = 300


class AgentSettings(BaseSettings):
    """What one agent server must know to start. A wrong value is refused with the variable's name."""

    model_config = SettingsConfigDict(env_prefix="", extra="ignore", populate_by_name=True)

    agent_id: AgentId = Field(description="who this agent is")
    gateway_url: str = Field(description="http://HOST:PORT of the gateway, the only thing that a sandbox reaches")
    agent_state_dir: Path = Field(description="folder of this agent alone; sessions live under it")
    enrolment_fd: int = Field(ge=0, description="descriptor from which the one-use enrolment secret is read")
    agent_listen_fd: int | None = Field(default=None, ge=0, description="inherited listening socket")
    agent_host: str = "127.0.0.1"
    agent_port: int = Field(default=8080, ge=0, le=65535)
    metrics_port: int | None = Field(
        default=None, ge=1, le=65535, description="serve /metrics here too, without the manager's bearer"
    )
    max_concurrent_requests: int = Field(default=100, ge=1, le=1000, description="sessions that may be placed here")
    live_sessions: int | None = Field(default=None, ge=1, le=1000, description="Claude CLI processes at a time")
    user_share: float = Field(
        default=1.0, gt=0, le=1, description="part of the memory, processes and live sessions that one user may use"
    )
    spares: int | None = Field(default=None, ge=0, le=100, description="connected CLIs that wait for a new session")
    park_after: float = Field(default=600.0, gt=0, description="seconds idle after which a session is parked")
    background_max: float = Field(
        default=600.0, gt=0, le=86400, description="seconds that what a turn left running may go on after it"
    )
    recycle_mb: int = Field(default=400, ge=100, description="private memory at which an idle CLI is replaced, MB")
    agent_memory_mb: int | None = Field(default=None, ge=64, description="memory of the sandbox, MB")
    agent_cores: int | None = Field(default=None, ge=1, description="virtual CPUs of the sandbox")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    log_format: LogFormat = "json"
    log_content: bool = Field(default=False, description="write prompts and answers into the log")
    tracing: bool = Field(default=False, description="make spans and hand them to the gateway")
    drain_grace: float = Field(default=10.0, ge=0, le=600, description="seconds that running turns get at shutdown")
    room_timeout: float = Field(default=30.0, gt=0, le=600, description="seconds that a turn waits for a process")
    workspace_max_mb: int = Field(default=256, ge=1, le=10_240, description="largest archive of a workspace")
    workspace_max_files: int = Field(
        default=50_000, ge=1, le=1_000_000, description="files and folders of a workspace that is archived"
    )
    approval_timeout: float = Field(default=120.0, gt=0, le=3000, description="seconds that a question to a user waits")
    skills_dir: Path = Field(
        default=Path("/opt/hypercore-agents/skills"), description="folder of the operator's skills; a folder each"
    )
    enrolment_timeout: float = Field(default=60.0, gt=0, le=600, description="seconds in which to enrol")
    cli_start_timeout: float = Field(
        default=30.0, gt=0, le=300, description="seconds without progress after which a CLI's start is given up"
    )
    interrupt_grace: float = Field(default=5.0, gt=0, le=60, description="seconds from interrupt to kill")
    claude_cli_path: Path | None = Field(
        default=None,
        validation_alias=AliasChoices("CLAUDE_CLI_PATH", "claude_cli_path"),
        description="what to start as the Claude CLI; default: the one bundled with the Agent SDK",
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
        """Return the memory that this agent may use, MB: as told, else all of the machine's."""
        if self.agent_memory_mb is not None:
            return self.agent_memory_mb
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20

    def cores(self) -> int:
        """Return the cores that this agent can use: as told, but never more than it is let have."""
        present = len(os.sched_getaffinity(0))
        return present if self.agent_cores is None else min(present, self.agent_cores)

    def prewarmed_target(self, live_limit: int) -> int:
        """Return how many spares to keep: as told, else one per core, within an eighth of the live processes."""
        return self.spares if self.spares is not None else min(self.cores(), live_limit // 8)

    def live_memory_mb(self) -> int:
        """Return the private memory that all CLIs together may have, MB."""
        return max(MEMORY_PER_SESSION_MB, self.memory_mb() - MEMORY_OF_SERVER_MB)

    def live_limit(self) -> int:
        """Return how many Claude CLI processes may run at a time: as told, else as many as memory holds."""
        if self.live_sessions is not None:
            return self.live_sessions
        return max(1, min(self._fitting(), self.max_concurrent_requests))

    def live_limit_of_user(self) -> int:
        """Return how many of them may be one user's: as many as the user's share of the memory holds."""
        return max(1, min(self.live_limit(), int(self._fitting() * self.user_share)))

    def _fitting(self) -> int:
        return (self.memory_mb() - MEMORY_OF_SERVER_MB) // MEMORY_PER_SESSION_MB
