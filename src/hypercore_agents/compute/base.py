"""The contract of a compute backend, which starts, stops and observes the sandboxes of agents.

Every backend guarantees the following, and the suite in `compute/testing/conformance.py` checks it:

- A sandbox is identified by its `agent_id` alone. The backend stores what it needs to find the sandbox again, also
  after the manager died, in its own state, so callers have no handle to lose.
- `start` is idempotent by `agent_id`: until `stop` has removed the sandbox, further calls return it as it is, running
  or exited. An agent is never started twice. A start that fails or is cancelled, at any step, leaves no process,
  socket, file or address.
- `stop` is idempotent: stopping an unknown sandbox succeeds. It returns only after the sandbox is confirmed gone, and
  raises `SandboxError` if it cannot confirm that; the sandbox then stays in `list`.
- `list` returns every sandbox that was started under this state directory, including those of a dead manager.
- A backend refuses what it cannot provide (a GPU, a limit) with `SandboxRefused`.

Rejected: a handle object that callers must persist (lost handles leak machines); `restart` (a server that restarts
inside its sandbox is a failed agent; a new agent is spawned instead).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from hypercore_agents.api.errors import AtCapacity, HypercoreError, InvalidRequest


class SandboxError(HypercoreError):
    """A sandbox could not be started, stopped or observed; a retry may succeed."""

    type = "unavailable"
    status = 503
    retryable = True


class SandboxRefused(InvalidRequest):
    """The backend can never satisfy the request. The message says what it offers."""


class InsufficientResources(AtCapacity):
    """The host cannot hold the sandbox now. The message has the numbers."""


class SandboxState(StrEnum):
    """The state of a sandbox as observed by its backend."""

    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True)
class Capabilities:
    """What a backend guarantees on this host.

    `isolation` describes it for people, in one sentence. `separates_agents`: an agent cannot reach the files and
    processes of the host or of other agents. `separates_sessions`: the sessions of an agent cannot reach one another;
    the agent's launcher enforces this, and an agent without a launcher offers no tools. `separates_network`: the
    programs of sessions reach the gateway and nothing else, in particular not the manager. `images`: a request may name
    the image of its sandbox. `session_disk` describes for people, in one sentence, how the files of a session are
    limited; `exact_disk`: the kernel counts them.
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
    """A sandbox to start. The backend passes `enrolment_secret` over its own channel, never by environment or disk.

    `environment` holds the agent's settings, never a secret; the backend adds the address to listen on, the agent's id
    and the place of the enrolment secret. `cores` and `memory_mb` are upper limits, not reservations; a backend that
    reserves raises InsufficientResources if it has too little left. `image` None: the backend chooses.
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
    """A sandbox as observed. The manager reaches the agent's server at `address` (`http://host:port`).

    `started_at` is in Unix seconds. `exit_status` is the process's status (negative: a signal), None while it runs or
    if it is unknown. `exit_reason` is the reason of the end, for people; None while it runs.
    """

    agent_id: str
    address: str
    state: SandboxState
    started_at: float
    exit_status: int | None = None
    exit_reason: str | None = None


@dataclass(frozen=True)
class MemoryAccount:
    """Memory of an agent or of all templates, in MB: as admission counts it, and as the control groups count it."""

    given_mb: int
    charged_mb: int


@dataclass(frozen=True)
class HostUsage:
    """The resources that a backend has for sandboxes, the part that sandboxes were given, and what is really free.

    `..._used` is the part that was given. A backend that only limits and does not reserve may give more than it has.
    `load` (in processors) and `..._free_mb` are the host's own figures. Memory and disk are in MB. `agents_memory` (by
    agent) and `templates_memory` are set by a backend whose control groups count memory.
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
        """Memory that agents and templates really use, in MB; None if no control group counts it."""
        if self.templates_memory is None:
            return None
        return self.templates_memory.charged_mb + sum(account.charged_mb for account in self.agents_memory.values())


class ComputeBackend(ABC):
    """Starts, stops and observes sandboxes. All methods may be called concurrently for different agents."""

    name: str
    capabilities: Capabilities

    @abstractmethod
    async def start(self, request: SandboxRequest) -> Sandbox:
        """Start the agent's sandbox; return once its process runs, which may be before its server answers.

        Where the backend can arrange it, `address` accepts connections from then on; they wait for the server.
        Raises SandboxRefused (this backend can never start it), InsufficientResources (not now) or SandboxError (the
        start failed, and nothing of it is left).
        """

    @abstractmethod
    async def stop(self, agent_id: str, *, grace: float = 10.0) -> None:
        """Signal the sandbox to end, wait at most `grace` seconds, then kill it; return when it is gone.

        Raises SandboxError if it cannot confirm that the sandbox is gone.
        """

    @abstractmethod
    async def inspect(self, agent_id: str) -> Sandbox | None:
        """Return a sandbox, also an exited one until `stop` removes it; None if it is unknown.

        A sandbox that is still starting may be unknown. Raises SandboxError if the state cannot be read.
        """

    @abstractmethod
    async def list(self) -> list[Sandbox]:
        """Return every sandbox of this backend, running or exited, whichever manager started it.

        Raises SandboxError if the state cannot be read. A sandbox that is missing from the result does not exist.
        """

    @abstractmethod
    async def logs(self, agent_id: str, *, limit: int = 65536) -> bytes:
        """Return the last `limit` bytes of the agent's output, empty if the sandbox is unknown.

        Raises SandboxError if the output cannot be read.
        """

    async def usage(self) -> HostUsage | None:
        """Return the use of the host's resources, None if the backend does not count them.

        Raises SandboxError if the figures cannot be read.
        """
        return None

    async def close(self) -> None:
        """Release the resources of this object in this process. Sandboxes continue to run."""
        return
