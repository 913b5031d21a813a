"""The plan of `up`: the processes to run and their settings, computed from the environment and `.env`."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from hypercore_agents.cli import monitoring
from hypercore_agents.cli.backends import choose_backend
from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.http.serve import bind, parse_address
from hypercore_agents.kit.environment import default_state_dir, with_env_file

_MEMORY_PER_AGENT_MB = 1024
_POOL_BY_DEFAULT = 2
_SCRATCH_MB, _RESERVED_DISK_MB = 4096, 2048  # as the microvm backend has them
NO_KEY = (
    "no Claude API key: set ANTHROPIC_API_KEY (in the environment or in .env), "
    "or ALLOW_PLATFORM_KEY=false if every user brings their own key, "
    "or use --demo to try everything on the built-in simulator"
)


@dataclass(frozen=True)
class Plan:
    """What `up` runs: the environment that its child processes share, and their listen addresses."""

    environment: dict[str, str]
    state: Path
    simulated: bool
    listen: str
    gateway: str
    simulator: str
    autoscaler: str
    pool: int
    backend: str
    monitored: bool
    no_autoscaler: str
    """Why no autoscaler runs; empty if one runs."""

    @property
    def url(self) -> str:
        """Base URL of the manager on this machine."""
        return f"http://{self.listen}"


def plan(demo: bool, backend: str | None = None, monitored: bool = False) -> Plan:
    """Return the plan for the environment and `.env`. Raises CommandError, which names the setting to change."""
    environment = with_env_file(_names_of_settings())
    simulated = demo and not environment.get("ANTHROPIC_API_KEY")
    bring_their_own = not is_on(environment.get("ALLOW_PLATFORM_KEY"), otherwise=True)
    if not simulated and not environment.get("ANTHROPIC_API_KEY") and not bring_their_own:
        raise CommandError(NO_KEY)
    state = Path(environment.get("STATE_DIR") or default_state_dir()).absolute()
    simulator = environment.get("SIMULATOR_LISTEN", "127.0.0.1:8099")
    if simulated:
        state = state / "demo"
        environment |= {"CLAUDE_API_URL": f"http://{simulator}", "ANTHROPIC_API_KEY": "the-simulator-needs-no-key"}
    skills = Path(environment["SKILLS_DIR"]) if environment.get("SKILLS_DIR") else None
    chosen, why = choose_backend(backend or environment.get("COMPUTE_BACKEND") or "auto", state, skills)
    environment["COMPUTE_BACKEND"] = chosen
    fits = _agents_that_fit()
    if chosen == "microvm":
        fits = min(fits, _disks_that_fit(state, _whole(environment.get("SCRATCH_MB", "")) or _SCRATCH_MB))
    environment.setdefault("MIN_AGENTS", str(min(_POOL_BY_DEFAULT, fits)))
    environment.setdefault("MAX_AGENTS", str(max(fits, _whole(environment["MIN_AGENTS"]))))
    environment.setdefault("AUTOSCALER_SIGNALS", "manager")
    gateway = environment.setdefault("GATEWAY_ADDR", "127.0.0.1:8090")
    environment |= {"STATE_DIR": str(state), "STOP_AGENTS_ON_EXIT": "true"}
    listen = environment.setdefault("LISTEN_ADDR", "127.0.0.1:8080")
    for name in ("LISTEN_ADDR", "GATEWAY_ADDR", "SIMULATOR_LISTEN", "AUTOSCALER_ADDR"):
        if name in environment:
            parse_address(environment[name], name)
    environment.setdefault("MANAGER_URL", f"http://{listen}")
    if monitored:
        monitoring.prepare(environment)
    pool = _whole(environment["MIN_AGENTS"])
    return Plan(
        environment=environment,
        state=state,
        simulated=simulated,
        listen=listen,
        gateway=gateway,
        simulator=simulator,
        autoscaler=environment.setdefault("AUTOSCALER_ADDR", "127.0.0.1:8091"),
        pool=pool,
        backend=why,
        monitored=monitored,
        no_autoscaler=_why_no_autoscaler(environment, pool),
    )


def require_free(intended: Plan) -> None:
    """Raise AddressError, which names the variable, for an address on which another program listens.

    Checked before the start: otherwise the answer of a foreign manager at the same address would count as ready.
    """
    addresses = [("LISTEN_ADDR", intended.listen), ("GATEWAY_ADDR", intended.gateway)]
    if intended.simulated:
        addresses.append(("SIMULATOR_LISTEN", intended.simulator))
    if not intended.no_autoscaler:
        addresses.append(("AUTOSCALER_ADDR", intended.autoscaler))
    for variable, address in addresses:
        host, port = parse_address(address, variable)
        bind(host, port, variable).close()


def _names_of_settings() -> frozenset[str]:
    """Return the names of all settings of all roles."""
    from hypercore_agents.manager.settings import KNOWN
    from hypercore_agents.simulator.settings import SimulatorSettings

    simulator = SimulatorSettings.model_config.get("env_prefix", "")
    return KNOWN | {f"{simulator}{name}".upper() for name in SimulatorSettings.model_fields}


def _agents_that_fit() -> int:
    """Return how many agents fit into half of this machine's memory, each with a few live sessions."""
    total_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    return max(1, int(total_mb) // (2 * _MEMORY_PER_AGENT_MB))


def _disks_that_fit(state: Path, scratch_mb: int) -> int:
    """Return how many full scratch disks of microVMs fit on the file system of the state folder."""
    place = next(folder for folder in (state, *state.parents) if folder.exists())
    return max(1, (shutil.disk_usage(place).free // 2**20 - _RESERVED_DISK_MB) // scratch_mb)


def _whole(text: str) -> int:
    return int(text) if text.isdigit() else 0  # the manager rejects a value that is not a number


def _why_no_autoscaler(environment: Mapping[str, str], pool: int) -> str:
    if pool == 0:
        return "MIN_AGENTS=0 switches the pool off"
    if is_on(environment.get("ENABLE_AUTH")) and not environment.get("AUTOSCALER_TOKEN"):
        return (
            "with ENABLE_AUTH it needs AUTOSCALER_TOKEN; create one with: "
            "hypercore-agents tokens create autoscaler --scope admin"
        )
    return ""


def is_on(text: str | None, *, otherwise: bool = False) -> bool:
    """Return the boolean value of a variable, parsed as the settings classes parse it; `otherwise` if it is unset."""
    if not text:
        return otherwise
    try:
        return TypeAdapter(bool).validate_python(text)
    except ValidationError:  # the manager and the gateway reject any other value
        return otherwise
