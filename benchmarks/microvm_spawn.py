"""How soon a microVM is ready, cold and from its template, alone and many at once, and what an idle one takes.

Ready: enrolled at a gateway and answering `/ready`; no Claude CLI runs yet. Memory: PSS of QEMU and its shim, sixty
seconds after ready, at ten VMs, and what control groups count then, without file cache, of what was given. Beside
Firecracker's published figures, which were measured under KVM on bare metal and end at the guest's first process, not
at a Python server that is enrolled: the accelerator here is named, so that TCG is not mistaken for KVM.

Needs root and the image (`hypercore-agents image build`). Aims: restore ÷ cold at most 0.08, 70 MB of PSS. What QEMU
translates under TCG is told apart from the rest, since KVM has none of it (nor QEMU's tables of it, which are not).
"""

import asyncio
import contextlib
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from measuring import arguments, percentile, progress, table, write_json

from hypercore_agents.api.ids import new_agent_id
from hypercore_agents.api.internal import AgentConfiguration, EnrolmentGrant, EnrolRequest, EnrolResponse
from hypercore_agents.compute.base import SandboxRequest
from hypercore_agents.compute.microvm.backend import MicrovmBackend
from hypercore_agents.compute.microvm.sizes import size_class
from hypercore_agents.security.bearers import new_bearer
from hypercore_agents.security.enrolment import seal_grant

CORES, MEMORY_MB = 1, 512
LONGEST_SECONDS = 300.0
AIM_MB = 70
FIRECRACKER = {"boot_ms": 125, "overhead_mib": 5, "source": "firecracker-microvm.github.io, SPECIFICATION.md"}


@contextlib.asynccontextmanager
async def gateway() -> AsyncIterator[str]:
    """Enrol every agent."""

    async def enrol(request: web.Request) -> web.Response:
        asked = EnrolRequest.model_validate_json(await request.read())
        grant = EnrolmentGrant(
            agent_token=new_bearer(),
            expires_at=time.time() + 86400,
            bearer=new_bearer(),
            configuration=AgentConfiguration(max_concurrent=10, tools=True, heartbeat_seconds=60),
        )
        answer = EnrolResponse(sealed=seal_grant(grant, asked.public_key, asked.agent_id))
        return web.Response(body=answer.model_dump_json(), content_type="application/json")

    async def anything(_: web.Request) -> web.Response:
        return web.json_response({"at": time.time()})

    app = web.Application()
    app.router.add_post("/internal/enrol", enrol)
    app.router.add_route("*", "/{rest:.*}", anything)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def ready(backend: MicrovmBackend, url: str, client: aiohttp.ClientSession, agent_id: str) -> float:
    """Start a VM; return the seconds until it is enrolled and serves."""
    began = time.perf_counter()
    sandbox = await backend.start(SandboxRequest(agent_id, CORES, MEMORY_MB, url, new_bearer()))
    async with asyncio.timeout(LONGEST_SECONDS):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with client.get(f"{sandbox.address}/ready") as answer:
                    if answer.status == 200:
                        return time.perf_counter() - began
            await asyncio.sleep(0.01)


async def one_by_one(backend: MicrovmBackend, url: str, client: aiohttp.ClientSession, times: int) -> list[float]:
    """Start and stop VMs one after another."""
    found = []
    for _ in range(times):
        agent_id = new_agent_id()
        try:
            found.append(await ready(backend, url, client, agent_id))
        finally:
            await backend.stop(agent_id, grace=0)
    return found


async def at_once(
    backend: MicrovmBackend, url: str, client: aiohttp.ClientSession, many: int, idle_seconds: float | None
) -> dict[str, float]:
    """Start VMs together; with `idle_seconds`, wait so long and measure their memory."""
    ids = [new_agent_id() for _ in range(many)]
    before, began = machines(), time.perf_counter()
    try:
        each = await asyncio.gather(*(ready(backend, url, client, agent_id) for agent_id in ids))
        all_ready = time.perf_counter() - began
        figures = {
            "all_ready_s": all_ready, "p50_s": statistics.median(each), "p95_s": percentile(each, 0.95),
            "per_second": many / all_ready,
        }  # fmt: skip
        if idle_seconds is not None:
            await asyncio.sleep(idle_seconds)
            mine = machines() - before
            parts: Counter[str] = Counter()
            for pid in mine:
                parts.update(pss_kb(pid))
                parts["shim"] += pss_kb(parent(pid)).total()
            for name, total in parts.items():
                figures[f"pss_mb_{name}"] = total / 1024 / max(1, len(mine))
            figures["pss_mb_per_vm"] = parts.total() / 1024 / max(1, len(mine))
            figures["pss_mb_untranslated"] = figures["pss_mb_per_vm"] - figures.get("pss_mb_translated_code", 0)
            figures["machines"] = len(mine)
            usage = await backend.usage()
            charged = [usage.agents_memory[name] for name in ids if name in usage.agents_memory]
            if charged and usage.templates_memory is not None:  # else this host has no control groups for memory
                figures["charged_mb_per_vm"] = statistics.mean(account.charged_mb for account in charged)
                figures["limit_mb_per_vm"] = charged[0].given_mb
                figures["templates_charged_mb"] = usage.templates_memory.charged_mb
                figures["templates_given_mb"] = usage.templates_memory.given_mb
        return figures
    finally:
        await asyncio.gather(*(backend.stop(agent_id, grace=0) for agent_id in ids))


def machines() -> set[int]:
    """Return the QEMU processes of this host's agents."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"\0-name\0hypercore-agent\0" in path.read_bytes():
                found.add(int(path.parent.name))
    return found


def parent(pid: int) -> int:
    """Return the shim above a QEMU."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def pss_kb(pid: int) -> Counter[str]:
    """Return a process's proportional set size by what it is for, kB (proc(5), smaps)."""
    found: Counter[str] = Counter()
    kind = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            translated = "w" in words[1] and "x" in words[1]
            kind = "guest" if "hypercore-template" in line else "translated_code" if translated else "qemu"
        elif words[0] == "Pss:":
            found[kind] += int(words[1])
    return found


async def make_template(backend: MicrovmBackend) -> float:
    """Make the template; return the seconds for its boot, its freeze and the filling of its memory's holes."""
    machine = backend._launcher.machine(size_class(CORES, MEMORY_MB))
    began = time.perf_counter()
    template = await backend._templates.get(backend._template_key(machine), machine)
    assert template is not None
    return time.perf_counter() - began


async def measure(quick: bool) -> dict[str, Any]:
    """Run everything; return the figures."""
    room: dict[str, Any] = {"memory_mb": 1 << 20, "cpu_overcommit": 1000.0, "scratch_mb": 512}
    async with gateway() as url, aiohttp.ClientSession() as client:
        with tempfile.TemporaryDirectory(prefix="hypercore-benchmark-") as folder:
            progress("cold starts")
            backend = MicrovmBackend(Path(folder) / "cold", template_memory_mb=0, **room)
            cold = await one_by_one(backend, url, client, 1 if quick else 3)
            await backend.close()
            progress("the template, and restores from it")
            backend = MicrovmBackend(Path(folder) / "warm", template_linger=0, **room)
            made_s = await make_template(backend)
            first = await one_by_one(backend, url, client, 1)
            restored = await one_by_one(backend, url, client, 5 if quick else 10)
            figures: dict[str, Any] = {
                "accelerator": backend.accelerator, "cold_s": statistics.median(cold),
                "first_s": made_s + first[0], "template_s": made_s,
                "restore_s": statistics.median(restored), "restore_p95_s": percentile(restored, 0.95),
                "restore_over_cold": statistics.median(restored) / statistics.median(cold), "firecracker": FIRECRACKER,
            }  # fmt: skip
            for many in (10,) if quick else (10, 30):
                progress(f"{many} at once")
                idle = (5.0 if quick else 60.0) if many == 10 else None
                figures[f"at_once_{many}"] = await at_once(backend, url, client, many, idle)
            await backend.close()
    return figures


def show(figures: dict[str, Any]) -> None:
    """Print the figures."""
    ten = figures["at_once_10"]
    rows = [
        ["cold start to ready", f"{figures['cold_s']:.2f} s", f"boot {FIRECRACKER['boot_ms']} ms"],
        ["first of its size (makes the template)", f"{figures['first_s']:.2f} s", ""],
        ["  of that booting, freezing and filling the template", f"{figures['template_s']:.2f} s", ""],
        ["restore to ready", f"{figures['restore_s']:.2f} s", ""],
        ["restore ÷ cold", f"{figures['restore_over_cold']:.3f}", ""],
    ]
    for name in ("at_once_10", "at_once_30"):
        if name in figures:
            many = figures[name]
            said = f"{many['all_ready_s']:.2f} s, {many['per_second']:.1f}/s, p95 {many['p95_s']:.2f} s"
            rows.append([f"{name.rpartition('_')[2]} at once, all ready", said, ""])
    overhead = f"VMM overhead {FIRECRACKER['overhead_mib']} MiB"
    rows.append([f"PSS per idle VM, server included; aim {AIM_MB}", f"{ten['pss_mb_per_vm']:.0f} MB", overhead])
    if "charged_mb_per_vm" in ten:
        for said, used, limit in (
            ("an idle VM's control group", ten["charged_mb_per_vm"], ten["limit_mb_per_vm"]),
            ("the template's control group", ten["templates_charged_mb"], ten["templates_given_mb"]),
        ):
            rows.append([f"{said}, of {limit} MB given", f"{used:.0f} MB, {used / limit:.2f} of it", ""])
    for name, said in (
        ("guest", "the guest's memory"), ("translated_code", "its translated code (TCG only)"),
        ("qemu", "QEMU itself"), ("shim", "its shim"),
    ):  # fmt: skip
        rows.append([f"  of that {said}", f"{ten.get(f'pss_mb_{name}', 0):.0f} MB", ""])
    rows.append(["  without translated code, as under KVM", f"{ten['pss_mb_untranslated']:.0f} MB", ""])
    table(f"microVMs of {CORES} core, {MEMORY_MB} MB; {figures['accelerator']}",
          ["", "here", "Firecracker (published; KVM, bare metal)"], rows)  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    options = arguments(__doc__ or "").parse_args()
    figures = asyncio.run(measure(options.quick))
    show(figures)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
