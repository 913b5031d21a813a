"""`up` and `down`: the whole platform on this machine, in the foreground or detached, and its end.

One `up` owns one state folder: it holds a lock there for as long as it lives, and `up.json` beside the lock says
who it is. Children get only the secrets that they need: the platform's API key reaches the gateway and nobody
else. In the demo the state is throw-away and is deleted at the end; otherwise it stays until `down --purge`.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dotenv import dotenv_values
from joserfc import jwt
from joserfc.jwk import OctKey
from rich.console import Console

from hypercore_agents.cli import monitoring
from hypercore_agents.cli.backends import choose_backend
from hypercore_agents.cli.faults import CommandFault
from hypercore_agents.cli.remote import show_json
from hypercore_agents.cli.supervisor import Child, Supervisor
from hypercore_agents.http.serve import parse_address

_console = Console(stderr=True, highlight=False, soft_wrap=True)
_START_SECONDS = 60.0
_POOL_SECONDS = 180.0
_STOP_SECONDS = 90.0
_MEMORY_PER_AGENT_MB = 1024
_POOL_BY_DEFAULT = 2
_SCRATCH_MB, _RESERVED_DISK_MB = 4096, 2048  # as the microvm backend has them
_SECRETS_OF_THE_GATEWAY = ("ANTHROPIC_API_KEY",)
NO_KEY = (
    "no Claude API key: set ANTHROPIC_API_KEY (in the environment or in .env), "
    "or ALLOW_PLATFORM_KEY=false if every user brings a key of their own, "
    "or use --demo to try everything on the built-in simulator"
)


@dataclass(frozen=True)
class Plan:
    """What `up` will run: the environment that its children share, and where they listen."""

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

    @property
    def url(self) -> str:
        """Base URL of the manager, as this machine reaches it."""
        return f"http://{self.listen}"


def plan(demo: bool, backend: str | None = None, monitored: bool = False) -> Plan:
    """Work out what to run from the environment and `.env`. Raises CommandFault with what to set."""
    given = {name: value for name, value in dotenv_values(".env").items() if value is not None}
    environment = {**given, **os.environ}
    simulated = demo and not environment.get("ANTHROPIC_API_KEY")
    bring_their_own = environment.get("ALLOW_PLATFORM_KEY", "").lower() in ("false", "0", "no", "off")
    if not simulated and not environment.get("ANTHROPIC_API_KEY") and not bring_their_own:
        raise CommandFault(NO_KEY)
    state = Path(environment.get("STATE_DIR") or Path.home() / ".hypercore-agents").absolute()
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
    return Plan(
        environment=environment,
        state=state,
        simulated=simulated,
        listen=listen,
        gateway=gateway,
        simulator=simulator,
        autoscaler=environment.setdefault("AUTOSCALER_ADDR", "127.0.0.1:8091"),
        pool=_whole(environment["MIN_AGENTS"]),
        backend=why,
        monitored=monitored,
    )


def up(*, demo: bool, detach: bool, backend: str | None = None, monitored: bool = False, as_json: bool = False) -> None:
    """Run everything; with `detach`, return once it is healthy and its pool is warm.

    `backend` is auto, process or microvm; None leaves it to COMPUTE_BACKEND, else auto.
    """
    intended = plan(demo, backend, monitored)
    intended.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.geteuid() == 0:
        # Agents' own users must get through to their folders below; what else is here, nobody else can list or read.
        intended.state.chmod(0o711)
    running = _who_runs(intended.state)
    if running is not None:
        if not detach:
            raise CommandFault(f"already running as process {running['pid']} with its state in {intended.state}")
        _say(f"already running at {running['url']} (process {running['pid']})")
        _announce(running["url"], int(running["pid"]), intended, as_json)
    elif detach:
        _say(intended.backend)
        pid = _detach(intended, demo)
        _announce(intended.url, pid, intended, as_json)
    else:
        with _lock(intended.state):
            asyncio.run(_run(intended, as_json))
            if intended.simulated:
                shutil.rmtree(intended.state, ignore_errors=True)


def down(*, purge: bool, as_json: bool = False) -> None:
    """Stop whatever `up` runs on these state folders; with `purge`, delete the state too."""
    base = Path(
        os.environ.get("STATE_DIR") or dotenv_values(".env").get("STATE_DIR") or Path.home() / ".hypercore-agents"
    ).absolute()
    stopped: list[int] = []
    for state in (base / "demo", base):
        running = _who_runs(state)
        if running is None:
            continue
        pid = int(running["pid"])
        _say(f"stopping process {pid} and its agents …")
        if not _ended(pid, _STOP_SECONDS):
            raise CommandFault(f"process {pid} still runs after {_STOP_SECONDS:.0f} s; see {state / 'up.log'}")
        stopped.append(pid)
    shutil.rmtree(base / "demo", ignore_errors=True)
    if purge:
        shutil.rmtree(base, ignore_errors=True)
    if base.exists() and not any(base.iterdir()):
        base.rmdir()
    stays = base.exists()
    if as_json:
        show_json({"stopped": stopped, "state_dir": str(base), "state_stays": stays})
        return
    _say(
        "stopped; nothing runs" if stopped else "nothing was running",
        f"the state stays in {base} (--purge deletes it)" if stays else "",
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
    await supervisor.run(start_seconds=_START_SECONDS, on_ready=ready)


def _children(intended: Plan) -> list[Child]:
    without_secrets = {k: v for k, v in intended.environment.items() if k not in _SECRETS_OF_THE_GATEWAY}
    simulator = Child(
        "simulator",
        ["simulator"],
        without_secrets | {"SIMULATOR_LISTEN": intended.simulator},
        f"http://{intended.simulator}/health",
    )
    gateway = Child("gateway", ["gateway"], intended.environment, f"http://{intended.gateway}/ready")
    manager = Child("manager", ["manager"], without_secrets, f"{intended.url}/ready", stop_seconds=75.0)
    autoscaler = Child(
        "autoscaler", ["autoscaler"], without_secrets, f"http://{intended.autoscaler}/health", stop_seconds=10.0
    )
    children = [*([simulator] if intended.simulated else []), gateway, manager]
    if intended.pool == 0:
        _say("no autoscaler: MIN_AGENTS=0 switches the pool off")
    elif _is_on(intended.environment.get("ENABLE_AUTH")) and not intended.environment.get("AUTOSCALER_TOKEN"):
        _say(
            "no autoscaler: with ENABLE_AUTH it needs AUTOSCALER_TOKEN, made by: "
            "hypercore-agents tokens create autoscaler --scope admin"
        )
    else:
        children.append(autoscaler)
    if intended.monitored:
        children += monitoring.children(
            intended.environment,
            intended.state,
            manager=intended.listen,
            autoscaler=intended.autoscaler if autoscaler in children else None,
            token_secret=intended.environment.get("JWT_SECRET")
            if _is_on(intended.environment.get("ENABLE_AUTH"))
            else None,
            say=_say,
        )
    return children


def _detach(intended: Plan, demo: bool) -> int:
    """Start `up` as a process of its own, wait until it is healthy and its pool is warm, and return its pid."""
    log = intended.state / "up.log"
    with open(log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as output:
        began = output.tell()
        process = subprocess.Popen(  # noqa: S603  our own interpreter and module
            [sys.executable, "-m", "hypercore_agents", "up", *_flags(intended, demo)],
            # So that what was said above is what is done, also where the choice was ours.
            env={**os.environ, "COMPUTE_BACKEND": intended.environment["COMPUTE_BACKEND"]},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        with _console.status("starting gateway and manager …") as status:
            _until(process, _START_SECONDS, lambda: _get(f"{intended.url}/ready") is not None)
            status.update(f"starting a pool of {intended.pool} agents …")
            _until(process, _POOL_SECONDS, lambda: _pool_running(intended) >= intended.pool)
    except BaseException as error:
        process.terminate()
        process.wait(_STOP_SECONDS)
        if not isinstance(error, _NotStarted):
            raise
        raise CommandFault(f"it did not start: {_why(log, began)}\n(the whole log: {log})") from None
    return process.pid


def _flags(intended: Plan, demo: bool) -> list[str]:
    return [*(["--demo"] if demo else []), *(["--monitoring"] if intended.monitored else [])]


class _NotStarted(Exception):
    """What was started ended, or did not become ready in time."""


def _until(process: subprocess.Popen[bytes], seconds: float, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if process.poll() is not None or time.monotonic() > deadline:
            raise _NotStarted
        time.sleep(0.1)


def _pool_running(intended: Plan) -> int:
    stats = _get(f"{intended.url}/v1/agents/stats", _admin(intended.environment)) or {}
    return int(stats.get("pool", {}).get("running", 0))


def _why(log: Path, began: int) -> str:
    """Return what the commands said about their end since `began` in the log, or else its last lines."""
    with log.open("rb") as file:
        file.seek(began)
        lines = file.read().decode(errors="replace").splitlines()
    said = [line.removeprefix("hypercore-agents: ") for line in lines if line.startswith("hypercore-agents: ")]
    return "; ".join(said) or "\n  ".join(["its last words were", *lines[-15:]])


def _admin(environment: Mapping[str, str]) -> str | None:
    """Return a token for the next minutes with which `up` may ask its own manager; None: authentication is off."""
    if not _is_on(environment.get("ENABLE_AUTH")):
        return None
    claims = {"sub": "up", "scope": "admin", "exp": int(time.time() + _POOL_SECONDS + _START_SECONDS)}
    return jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(environment.get("JWT_SECRET", "")))


def _get(url: str, token: str | None = None) -> dict[str, Any] | None:
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {token}"} if token else {})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:  # noqa: S310  our own http address
            body = json.loads(answer.read() or b"{}")
            return body if isinstance(body, dict) else {}
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _lock(state: Path) -> Iterator[None]:
    with (state / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CommandFault(f"another `up` uses {state}; stop it with: hypercore-agents down") from None
        record = state / "up.json"
        try:
            record.write_text(json.dumps({"pid": os.getpid(), "url": plan_url()}))
            yield
        finally:
            record.unlink(missing_ok=True)
            (state / "up.lock").unlink(missing_ok=True)


def plan_url() -> str:
    """Return the manager's base URL by the environment and `.env`."""
    listen = os.environ.get("LISTEN_ADDR") or dotenv_values(".env").get("LISTEN_ADDR") or "127.0.0.1:8080"
    return f"http://{listen}"


def _who_runs(state: Path) -> dict[str, Any] | None:
    """Return the record of the `up` that holds this folder's lock, or None: a record alone proves nothing."""
    try:
        with (state / "up.lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                record = json.loads((state / "up.json").read_text())
                return record if isinstance(record, dict) else None
    except (OSError, ValueError):
        return None
    return None


def _agents_that_fit() -> int:
    """Return how many agents half of this machine's memory holds, each with a few live sessions."""
    total_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    return max(1, int(total_mb) // (2 * _MEMORY_PER_AGENT_MB))


def _disks_that_fit(state: Path, scratch_mb: int) -> int:
    """Return how many microVMs' disks the state's file system holds, each in full."""
    place = next(folder for folder in (state, *state.parents) if folder.exists())
    return max(1, (shutil.disk_usage(place).free // 2**20 - _RESERVED_DISK_MB) // scratch_mb)


def _whole(text: str) -> int:
    return int(text) if text.isdigit() else 0  # what is no number, the manager refuses by name


def _is_on(text: str | None) -> bool:
    return (text or "").lower() in ("1", "true", "yes", "on")


def _say(*lines: str) -> None:
    for line in filter(None, lines):
        _console.print(line, markup=False)


def _ended(pid: int, seconds: float) -> bool:
    """Ask a process to end and wait until it has; the descriptor names this process even if its id is used again."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        return bool(select.select([process], [], [], seconds)[0])
    except ProcessLookupError:
        return True
    finally:
        os.close(process)


def _record(url: str, pid: int, intended: Plan) -> dict[str, Any]:
    """Return what `--json` says of a platform that runs."""
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
