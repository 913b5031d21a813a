"""`loadtest`: simulated users chat with a running platform. Exits with code 0 if enough turns succeed, else 1."""

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.cli.remote import INTERRUPTED, REFUSED, AsJson, default_url, manager, show_json, show_table


def loadtest(
    api_url: Annotated[
        str | None, typer.Option("--api-url", "--url", metavar="URL", help="URL of the manager.")
    ] = None,
    anthropic_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Claude API key of agents that the test spawns and uses instead of the pool."),
    ] = None,
    users: Annotated[int, typer.Option(min=1, max=100_000, help="Number of users, each with one session.")] = 10,
    requests: Annotated[int, typer.Option(min=1, max=1_000_000, help="Turns per user.")] = 5,
    ramp_up: Annotated[float, typer.Option(min=0, help="Seconds within which all users start.")] = 5.0,
    interval: Annotated[
        float,
        typer.Option(min=0, help="Seconds between the turns of a user; 0 starts each turn when the previous one ends."),
    ] = 1.0,
    agents: Annotated[int | None, typer.Option(min=0, help="Number of agents to spawn; 0 uses the pool.")] = None,
    prompt: Annotated[str, typer.Option(help="Prompt of every turn.")] = "Hello! Say something short.",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a turn counts as failed.")] = 300.0,
    min_success: Annotated[float, typer.Option(min=0, max=1, help="Minimum share of turns that must succeed.")] = 0.99,
    output: Annotated[Path | None, typer.Option(help="Write the result to this file as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how a running platform serves many users.

    Each user chats by its own timetable. The test measures waiting times and the share of successful turns.
    """
    try:
        from hypercore_agents.loadtest.runner import Runner
    except ModuleNotFoundError as error:
        if error.name != "hdrh":
            raise
        raise CommandError("loadtest needs hdrhistogram: pip install 'hypercore-agents[loadtest]'") from None
    from hypercore_agents.loadtest.scenario import Scenario, agents_for

    if output is not None and not output.absolute().parent.is_dir():
        raise CommandError(f"--output: there is no folder {output.absolute().parent}")
    spawned = agents if agents is not None else agents_for(users) if anthropic_key else 0
    if anthropic_key and not spawned:
        raise CommandError("--anthropic-key applies to spawned agents only; omit it with --agents 0")
    scenario = Scenario(
        users=users,
        requests=requests,
        ramp_up=ramp_up,
        interval=interval,
        prompt=prompt,
        agents=spawned,
        timeout=timeout,
    )

    async def run() -> tuple[dict[str, Any], bool, float]:
        runner = Runner(scenario, url, key=anthropic_key)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, runner.stop.set)
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        report = await runner.run(_progress())
        settings = {"users": users, "requests_per_user": requests, "ramp_up_seconds": ramp_up,
                    "interval_seconds": interval, "agents_spawned": spawned}  # fmt: skip
        result = report.as_json(
            seconds=runner.seconds, started_at=began, interrupted=runner.stop.is_set(), settings=settings
        )
        return result, runner.stop.is_set(), report.success_rate

    url = api_url or default_url()
    with manager(url) as client:
        client.get("/ready")
        result, interrupted, rate = asyncio.run(run())
    if output is not None:
        _write(output, result)
    _show(result, as_json)
    if interrupted:
        raise SystemExit(INTERRUPTED)
    if rate < min_success:
        raise SystemExit(REFUSED)


def _progress() -> Any:
    live = sys.stderr.isatty()

    def show(line: str) -> None:
        sys.stderr.write(f"\r\033[K{line}" if live else f"{line}\n")
        sys.stderr.flush()

    return show


def _write(path: Path, result: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(partial, path)


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(result)
        return
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    turns = result["turns"]
    show_table(
        ("WAIT, MS", "COUNT", "P50", "P90", "P95", "P99", "P99.9", "MAX"),
        [
            (name, *(f"{waits[key]:g}" for key in ("count", "p50", "p90", "p95", "p99", "p99_9", "max")))
            for name, waits in result["latency_ms"].items()
        ],
        empty="",
    )
    errors = ", ".join(f"{count} {kind}" for kind, count in result["errors"].items())
    typer.echo(
        f"{turns['succeeded']} of {turns['planned']} turns succeeded ({turns['success_rate']:.2%}), "
        f"{turns['per_second']:g} per second, {result['tokens']} tokens, ${result['cost_usd']:.6f}"
        + (f"; failed: {errors}" if errors else "")
    )
