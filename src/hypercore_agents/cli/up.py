"""`up` and `down`: start and stop the whole platform on this machine, in the foreground or in the background.

One `up` owns one state folder (`ownership.py`). `up_plan.py` computes what runs; `detach.py` starts `up` in the
background. Each child process receives only the secrets that it needs (`_NEEDED_BY`): only the gateway receives the
platform's API key, only the manager the JWT secret. A demo deletes its state when it stops; otherwise the state is
retained until `down --purge`.
"""

import asyncio
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from rich.console import Console

from hypercore_agents.cli import monitoring
from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.cli.detach import START_SECONDS, STOP_SECONDS, detach
from hypercore_agents.cli.log_rotation import keep_rotating
from hypercore_agents.cli.ownership import ended, holding, who_runs
from hypercore_agents.cli.remote import show_json
from hypercore_agents.cli.supervisor import Child, Supervisor
from hypercore_agents.cli.up_plan import Plan, is_on, plan, require_free
from hypercore_agents.kit.environment import make_state_dir, state_dir

_console = Console(stderr=True, highlight=False, soft_wrap=True)
_NEEDED_BY = {
    "ANTHROPIC_API_KEY": ("gateway",),
    "JWT_SECRET": ("manager",),
    "DATABASE_URL": ("gateway", "manager"),
    "AUTOSCALER_TOKEN": ("autoscaler",),
}
"""Variables that hold a secret, and the roles that receive each."""
_BLOB_STORE_ROLES = ("gateway", "manager")
"""Roles that use the blob store. They receive all AWS_* variables, some of which only its client reads."""


def up(
    *, demo: bool, detached: bool, backend: str | None = None, monitored: bool = False, as_json: bool = False
) -> None:
    """Run everything. With `detached`, return once the platform is healthy and its pool is running.

    `backend` is auto, process or microvm; None selects COMPUTE_BACKEND, or auto if that is unset.
    """
    intended = plan(demo, backend, monitored)
    make_state_dir(intended.state)
    if os.geteuid() == 0:
        # The users of agents need to traverse this folder to reach their own; the mode denies them listing and reading.
        intended.state.chmod(0o711)
    running = who_runs(intended.state)
    if running is not None:
        if not detached:
            raise CommandError(f"already running as process {running['pid']} with its state in {intended.state}")
        _say(f"already running at {running['url']} (process {running['pid']})")
        _announce(running["url"], int(running["pid"]), intended, as_json)
    elif detached:
        require_free(intended)
        _say(intended.backend)
        pid = detach(intended, demo, _console)
        _announce(intended.url, pid, intended, as_json)
    else:
        with holding(intended.state, intended.url):
            require_free(intended)
            asyncio.run(_run(intended, as_json))
            if intended.simulated:
                shutil.rmtree(intended.state, ignore_errors=True)


def down(*, purge: bool, as_json: bool = False) -> None:
    """Stop the platforms that run on these state folders; with `purge`, also delete the state."""
    base = state_dir()
    stopped: list[int] = []
    for state in (base / "demo", base):
        running = who_runs(state)
        if running is None:
            continue
        pid = int(running["pid"])
        _say(f"stopping process {pid} and its agents …")
        if not ended(pid, STOP_SECONDS):
            raise CommandError(f"process {pid} is still running after {STOP_SECONDS:.0f} s; see {state / 'up.log'}")
        stopped.append(pid)
    shutil.rmtree(base / "demo", ignore_errors=True)
    if purge:
        shutil.rmtree(base, ignore_errors=True)
    if base.exists() and not any(base.iterdir()):
        base.rmdir()
    retained = base.exists()
    if as_json:
        show_json({"stopped": stopped, "state_dir": str(base), "state_stays": retained})
        return
    _say(
        "stopped; nothing runs" if stopped else "nothing was running",
        f"the state stays in {base} (--purge deletes it)" if retained else "",
    )


async def _run(intended: Plan, as_json: bool) -> None:
    supervisor = Supervisor(_children(intended), _say)

    def ready() -> None:
        _say(f"ready at {intended.url}; Ctrl-C stops everything")
        if as_json:
            show_json(_record(intended.url, os.getpid(), intended))

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stop.set)
    _say(f"starting; the state is in {intended.state}", intended.backend)
    rotating = asyncio.create_task(keep_rotating(intended.state / "up.log"), name="up.log")
    try:
        await supervisor.run(start_seconds=START_SECONDS, on_ready=ready)
    finally:
        rotating.cancel()


def _roles_with(variable: str, role: str) -> tuple[str, ...]:
    return _BLOB_STORE_ROLES if variable.startswith("AWS_") else _NEEDED_BY.get(variable, (role,))


def _children(intended: Plan) -> list[Child]:
    def environment_of(role: str) -> dict[str, str]:
        return {name: value for name, value in intended.environment.items() if role in _roles_with(name, role)}

    simulator = Child(
        "simulator",
        ["simulator"],
        environment_of("simulator") | {"SIMULATOR_LISTEN": intended.simulator},
        f"http://{intended.simulator}/health",
    )
    gateway = Child("gateway", ["gateway"], environment_of("gateway"), f"http://{intended.gateway}/ready")
    manager = Child("manager", ["manager"], environment_of("manager"), f"{intended.url}/ready", stop_seconds=75.0)
    autoscaler = Child(
        "autoscaler",
        ["autoscaler"],
        environment_of("autoscaler"),
        f"http://{intended.autoscaler}/health",
        stop_seconds=10.0,
    )
    children = [*([simulator] if intended.simulated else []), gateway, manager]
    if intended.no_autoscaler:
        _say(f"no autoscaler: {intended.no_autoscaler}")
    else:
        children.append(autoscaler)
    if intended.monitored:
        children += monitoring.children(
            intended.environment,
            intended.state,
            manager=intended.listen,
            autoscaler=intended.autoscaler if autoscaler in children else None,
            token_secret=intended.environment.get("JWT_SECRET")
            if is_on(intended.environment.get("ENABLE_AUTH"))
            else None,
            say=_say,
        )
    return children


def _say(*lines: str) -> None:
    for line in filter(None, lines):
        _console.print(line, markup=False)


def _record(url: str, pid: int, intended: Plan) -> dict[str, Any]:
    """Return the object that `--json` prints for a running platform."""
    backend = intended.environment["COMPUTE_BACKEND"]
    return {"url": url, "pid": pid, "state_dir": str(intended.state), "backend": backend,
            "pool": intended.pool, "simulated": intended.simulated}  # fmt: skip


def _announce(url: str, pid: int, intended: Plan, as_json: bool) -> None:
    if as_json:
        show_json(_record(url, pid, intended))
    else:
        _print_next(url, intended.state)


def _print_next(url: str, state: Path) -> None:
    _say(
        f"Hypercore Agents is up at {url} (state and logs in {state}). Try:",
        "",
        f"  curl {url}/health",
        f"  curl {url}/v1/agent/chat -H 'content-type: application/json' \\",
        '    -d \'{"user_id": "ada", "prompt": "Hello! Who are you?"}\'',
        f"  curl {url}/v1/agents/spawn -H 'content-type: application/json' -d '{{\"user_id\": \"ada\"}}'",
        "",
        "Stop it with: ./scripts/deploy-claude-agents.sh --stop",
    )
