"""The contract between the platform and whatever runs an agent's sandbox.

Invariants that every backend keeps, and that `compute/testing.py` checks:

- A sandbox is named by its `agent_id` and by nothing else; the backend keeps what it needs to find it
  again (also after the manager died) in its own state, so that there is no handle to lose.
- `start` is idempotent by `agent_id`: asked again, it returns the sandbox as it is, running or exited, until `stop`
  has removed it: an agent is never started twice. A start that fails or is cancelled, at any step, leaves nothing
  behind: no process, socket, file, address.
- `stop` is idempotent: stopping what is not there succeeds. It returns only when the sandbox is gone for
  certain, and raises `SandboxError` when it could not make sure; the sandbox then stays in `list`.
- `list` shows every sandbox that this backend started under this state directory, those of a dead manager too.
- What a backend cannot give (a GPU, a limit) it refuses with `SandboxRefused`; it never pretends.

Rejected: a handle object that callers must persist (lost handles leak machines); `restart` (a server that
restarts inside the sandbox is a failed agent, a new one is spawned instead).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from hypercore_agents.api.errors import AtCapacity, HypercoreError, InvalidRequest


class SandboxError(HypercoreError):
    """A sandbox could not be started, stopped or looked at; trying again may help."""

    type = "unavailable"
    status = 503
    retryable = True


class SandboxRefused(InvalidRequest):
    """The backend can never give what was asked; the message says what it has."""


class InsufficientResources(AtCapacity):
    """The host cannot hold the sandbox now. The message has the numbers."""


class SandboxState(StrEnum):
    """What the backend observes of a sandbox."""

    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True)
class Capabilities:
    """What a backend can honestly promise.

    `isolation` is one sentence for people. `separates_agents`: an agent cannot reach the host's or another
    agent's files and processes. `separates_sessions`: sessions inside one agent cannot reach one another;
    the agent's launcher sees to that, and an agent that finds itself without one offers no tools.
    `separates_network`: what sessions run reaches the gateway and nothing else, not the manager in particular.
    `images`: a request may name the image that its sandbox is made from. `session_disk`: one sentence for people on how
    a session's files are limited, and `exact_disk` whether the kernel counts them.
    """

    isolation: str
    separates_agents: bool
    separates_sessions: bool
    separates_network: bool = False
    gpu: bool = False
    images: bool = False
    enforced_limits: frozenset[str] = frozenset()
    session_disk: str = "not limited"
    exact_disk: bool = False


@dataclass(frozen=True)
class SandboxRequest:
    """What to start. `enrolment_secret` travels over the backend's own channel, never by environment or disk.

    `environment` holds the agent's settings (never a secret); the backend adds where to listen, the agent's id
    and how to find the enrolment secret. `cores` and `memory_mb` are upper limits, not reservations: a backend that
    reserves says InsufficientResources when it has too little left. `image` None: the backend's own choice.
    """

    agent_id: str
    cores: int
    memory_mb: int
    gateway_url: str
    enrolment_secret: str = field(repr=False)
    gpu_quota_mb: int | None = None
    image: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sandbox:
    """A sandbox as observed. `address` (`http://host:port`) is where the manager reaches the agent's server.

    `started_at` is in Unix seconds. `exit_status` is the process's (negative: a signal), None while it runs or
    where it is unknown. `exit_reason` is for people: what the backend knows of why it ended, None while it runs.
    """

    agent_id: str
    address: str
    state: SandboxState
    started_at: float
    exit_status: int | None = None
    exit_reason: str | None = None


@dataclass(frozen=True)
class MemoryAccount:
    """Memory that admission counts for something (`given_mb`), and that control groups count (`charged_mb`)."""

    given_mb: int
    charged_mb: int


@dataclass(frozen=True)
class HostUsage:
    """What a backend that counts has for sandboxes, how much of it is given to them, and what is really free.

    `..._used` is what was promised (where a backend only limits and reserves nothing, more may be promised than there
    is), `load` and `..._free_mb` what the host itself sees. Memory and disk in MB; `load` in processors.
    `agents_memory` (by agent) and `templates_memory` are of a backend whose control groups count memory; they are
    empty and None elsewhere, and where they were not asked for.
    """

    cores: int
    cores_used: int
    memory_mb: int
    memory_used_mb: int
    sandboxes: int
    disk_mb: int = 0
    disk_used_mb: int = 0
    load: float = 0.0
    memory_free_mb: int = 0
    disk_free_mb: int = 0
    agents_memory: Mapping[str, MemoryAccount] = field(default_factory=dict)
    templates_memory: MemoryAccount | None = None

    @property
    def memory_charged_mb(self) -> int | None:
        """Memory that agents and templates really use, None where nothing counts it."""
        if self.templates_memory is None:
            return None
        return self.templates_memory.charged_mb + sum(account.charged_mb for account in self.agents_memory.values())


class ComputeBackend(ABC):
    """Where agents run. All methods are safe to call concurrently for different agents."""

    name: str
    capabilities: Capabilities

    @abstractmethod
    async def start(self, request: SandboxRequest) -> Sandbox:
        """Start the agent's sandbox and return once its process runs (not once its server answers).

        `address` accepts connections from then on where the backend can arrange it; they wait for the server.
        Raises SandboxRefused (this backend can never start it), InsufficientResources (not now) or SandboxError (the
        start failed, and nothing of it is left).
        """

    @abstractmethod
    async def stop(self, agent_id: str, *, grace: float = 10.0) -> None:
        """Stop the sandbox: ask, wait at most `grace` seconds, then kill; return when it is gone.

        Raises SandboxError when it cannot be confirmed that it is gone.
        """

    @abstractmethod
    async def inspect(self, agent_id: str) -> Sandbox | None:
        """Return what is known of a sandbox, exited ones included until `stop` cleans them up; None if unknown.

        A sandbox whose start is still under way may be unknown. Raises SandboxError when it cannot look.
        """

    @abstractmethod
    async def list(self) -> list[Sandbox]:
        """Return every sandbox of this backend, running or exited, whoever started it.

        Raises SandboxError when it cannot look: an answer without a sandbox means that it is not there.
        """

    @abstractmethod
    async def logs(self, agent_id: str, *, limit: int = 65536) -> bytes:
        """Return the last `limit` bytes that the agent printed; empty when the sandbox is unknown.

        Raises SandboxError when it cannot look.
        """

    async def usage(self) -> HostUsage | None:
        """Return what of the host is taken; None for a backend that does not count.

        Raises SandboxError when it cannot look.
        """
        return None

    async def close(self) -> None:
        """Release what this object holds in this process. Sandboxes go on running."""
        return
