"""`doctor`: check this machine for the requirements of the platform; name the command for each missing one."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hypercore_agents.cli.backends import STALE_SKILLS, image_holds
from hypercore_agents.cli.findings import Finding
from hypercore_agents.cli.remote import REFUSED, AsJson, show_json, show_table

if TYPE_CHECKING:
    from pydantic import ValidationError

    from hypercore_agents.compute.base import Capabilities

_DESCRIPTORS = 10_000
_DISK_GB = 2
_FULL_DISK_GB = 0.25
_MEMORY_GB = 2


def doctor(as_json: AsJson = False) -> None:
    """Check this machine and name what is missing.

    Checks versions, settings, backend, isolation, accelerator, limits, disk, clock, store, blob store, running roles
    and API key. Changes nothing. Exits with code 1 if something is missing.
    """
    findings = list(examine())
    if as_json:
        show_json([asdict(finding) for finding in findings])
    else:
        marks = {"ok": "✓", "warning": "!", "missing": "✗"}
        rows = [(marks[f.state], f.name, f.found, f.remedy) for f in findings]
        show_table(("", "WHAT", "FOUND", "REMEDY"), rows, empty="")
    if any(finding.state == "missing" for finding in findings):
        raise SystemExit(REFUSED)


def examine() -> Iterator[Finding]:
    """Yield all findings; a check that raises is a finding as well."""
    from hypercore_agents.cli import services

    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions, _settings, _backend, _accelerator, _limits, _clock,
        services.store, services.blob_store, services.roles, _key,
    )  # fmt: skip
    from pydantic import ValidationError

    reported = set[Finding]()
    for check in checks:
        try:
            yield from check()
        except ValidationError as error:  # several checks read the settings: report each invalid one once
            wrong = [finding for finding in _wrong(error) if finding not in reported]
            reported.update(wrong)
            yield from wrong
        except Exception as error:
            yield Finding(check.__name__.strip("_"), "missing", f"{type(error).__name__}: {error}"[:300])


def _wrong(error: "ValidationError") -> Iterator[Finding]:
    for fault in error.errors(include_input=False, include_url=False):
        name = str(fault["loc"][0]).upper() if fault["loc"] else "settings"
        what = f"{name}: {fault['msg'].removeprefix('Value error, ')}"
        yield Finding("settings", "missing", what, "correct it in the environment or in .env")


def _versions() -> Iterator[Finding]:
    from hypercore_agents import __version__

    yield Finding("hypercore-agents", "ok", __version__)
    enough = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if enough else "missing", platform.python_version(), "" if enough else "use 3.11+")
    from hypercore_agents.agent.claude.options import bundled_cli

    cli = bundled_cli()
    answer = subprocess.run([cli, "--version"], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    works = answer.returncode == 0
    yield Finding(
        "claude cli",
        "ok" if works else "missing",
        answer.stdout.strip() if works else answer.stderr.strip()[:200],
        "" if works else "install again: pip install --force-reinstall claude-agent-sdk==0.2.187",
    )


def _settings() -> Iterator[Finding]:
    from hypercore_agents.manager.settings import ManagerSettings, warnings_about

    settings = ManagerSettings()
    for warning in warnings_about(os.environ, Path(".env")):
        yield Finding("settings", "warning", warning)
    existing = next(
        path for path in (settings.state_dir.absolute(), *settings.state_dir.absolute().parents) if path.exists()
    )
    writable = os.access(existing, os.W_OK)
    yield Finding(
        "state folder",
        "ok" if writable else "missing",
        str(settings.state_dir),
        "" if writable else f"make it writable for {os.geteuid()}, or set STATE_DIR",
    )
    yield from _disks(settings.state_dir.absolute(), settings.database_url)


def _disks(state: Path, database_url: str | None) -> Iterator[Finding]:
    """Yield the free space on the disk of the state folder, and on that of a SQLite store elsewhere."""
    places = [state]
    if database_url is not None and database_url.startswith("sqlite") and (path := database_url.partition(":///")[2]):
        places.append(Path(path).absolute())
    seen = set()
    for place in places:
        existing = next(path for path in (place, *place.parents) if path.exists())
        if (device := existing.stat().st_dev) in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(existing).free / 2**30
        full = free < _FULL_DISK_GB
        enough = free >= _DISK_GB
        space = f"{free:.1f} GB free" if not full else f"{free * 1024:.0f} MB free on the disk of {existing}"
        remedy = "" if enough else "free some space; with a full disk no turn begins (docs/runbooks/disk-low.md)"
        yield Finding("disk", "missing" if full else "ok" if enough else "warning", space, remedy)


def _backend() -> Iterator[Finding]:
    import asyncio

    from hypercore_agents.compute.base import SandboxRefused
    from hypercore_agents.compute.registry import open_backend
    from hypercore_agents.manager.settings import ManagerSettings

    settings = ManagerSettings()
    name = settings.compute_backend

    async def findings_of_backend() -> Iterator[Finding]:
        backend = open_backend(name, settings.state_dir)
        try:
            able = backend.capabilities
        finally:
            await backend.close()
        tools = (able.separates_sessions and able.separates_network) or settings.allow_unisolated_tools
        stronger = "" if name == "microvm" else "COMPUTE_BACKEND=microvm gives each agent a kernel of its own"
        remedy = "" if tools else "tools need isolated sessions; at your own risk: ALLOW_UNISOLATED_TOOLS=1"
        return iter([
            Finding("backend", "ok", name),
            Finding("isolation", "ok" if able.separates_agents else "warning", able.isolation, stronger),
            Finding("tools", "ok" if tools else "warning", "on" if tools else "off", remedy),
            Finding("session disk", "ok" if able.exact_disk else "warning", able.session_disk, _exact(able)),
        ])  # fmt: skip

    try:
        yield from asyncio.run(findings_of_backend())
    except SandboxRefused as error:
        yield Finding("backend", "missing", str(error), "set COMPUTE_BACKEND, or follow the message")


def _exact(able: "Capabilities") -> str:
    if able.exact_disk:
        return ""
    if not able.separates_sessions:
        return "the files of sessions are limited only with isolated sessions: run as root, or COMPUTE_BACKEND=microvm"
    return "an exact limit needs loop devices (/dev/loop-control) and e2fsprogs, or COMPUTE_BACKEND=microvm"


def _accelerator() -> Iterator[Finding]:
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        yield Finding("qemu", "warning", "not installed; only microVMs need it", "apt-get install qemu-system-x86")
    else:
        yield Finding("qemu", "ok", qemu)
    from hypercore_agents.compute.microvm.accelerator import accelerator
    from hypercore_agents.compute.microvm.image import find
    from hypercore_agents.manager.settings import ManagerSettings

    settings = ManagerSettings()
    state, wanted = settings.state_dir, settings.microvm_accelerator
    image = find(state)
    if image is None:
        build = "for microVMs: hypercore-agents image build"
        yield Finding("image", "warning", "not built for this version; only microVMs need it", build)
    else:
        yield Finding("image", "ok", image.image_id)
        if settings.skills_dir is not None and not image_holds(settings.skills_dir, state):
            yield Finding("skills", "warning", STALE_SKILLS, "for microVMs: hypercore-agents image build")
    if wanted != "auto":
        yield Finding("accelerator", "ok", f"{wanted}: set by MICROVM_ACCELERATOR")
        return
    if qemu is None or image is None:
        yield Finding("accelerator", "warning", "unknown: the check boots the kernel of the image in QEMU")
        return
    if state.is_dir():
        used = accelerator(image, state)
    else:
        with tempfile.TemporaryDirectory() as nowhere:
            used = accelerator(image, Path(nowhere))
    remedy = "" if used.name == "kvm" else "microVMs are slower in CPU; see docs/runbooks/microvm-host.md"
    yield Finding("accelerator", "ok" if used.name == "kvm" else "warning", f"{used.name}: {used.reason}", remedy)


def _limits() -> Iterator[Finding]:
    import resource

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    enough = memory >= _MEMORY_GB
    yield Finding(
        "machine",
        "ok" if enough else "warning",
        f"{cores} cores, {memory:.1f} GB",
        "" if enough else "an agent needs about 1 GB; lower MIN_AGENTS",
    )
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = hard == resource.RLIM_INFINITY or hard >= _DESCRIPTORS
    remedy = "" if many else f"ulimit -n {_DESCRIPTORS}, or LimitNOFILE= in the unit"
    yield Finding("descriptors", "ok" if many else "warning", str(hard), remedy)


def _clock() -> Iterator[Finding]:
    # Certificates and tokens are checked against this clock.
    built = Path(__file__).stat().st_mtime
    sane = time.time() > built - 86_400
    shown = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    yield Finding("clock", "ok" if sane else "missing", shown, "" if sane else "set it: timedatectl set-ntp true")


def _key() -> Iterator[Finding]:
    from hypercore_agents.gateway.settings import GatewaySettings

    settings = GatewaySettings()
    if settings.anthropic_api_key is not None:
        yield Finding("claude api key", "ok", "ANTHROPIC_API_KEY is set")
    elif not settings.allow_platform_key:
        yield Finding("claude api key", "ok", "every user brings their own (ALLOW_PLATFORM_KEY=false)")
    else:
        yield Finding(
            "claude api key",
            "warning",
            "none in the environment or .env",
            "put ANTHROPIC_API_KEY=... in .env, or try everything without: hypercore-agents up --demo",
        )
