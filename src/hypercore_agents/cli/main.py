"""The `hypercore-agents` command. Each subcommand imports what it needs when it runs, so that `--help` is quick."""

import io
import sys
from typing import Annotated, Any

import typer

from hypercore_agents.cli import (
    blobs,
    chat,
    configuration,
    doctor,
    files,
    fleet,
    image,
    keys,
    load_test,
    store,
    tokens,
    usage,
)
from hypercore_agents.cli.remote import AsJson

app = typer.Typer(
    name="hypercore-agents",
    help="Run the Claude Agent SDK for thousands of users, one sandbox per agent.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: loading rich with Markdown takes longer than everything else
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 success; 1 refused or failed; 2 invalid argument or setting; 3 no answer; 130 interrupted.",
)
_CONFIGURED = {"autoscaler", "blobs", "config", "doctor", "down", "gateway", "keys", "manager", "store", "tokens", "up"}
"""Commands that take settings from `.env`."""
_ROLES = {"autoscaler", "gateway", "manager", "up"}
_AGENTS, _OPERATING = "Agents and sessions", "Operating"
for _command in (fleet.spawn, chat.chat, fleet.get, fleet.delete, fleet.stats, fleet.logs, usage.usage):
    app.command(rich_help_panel=_AGENTS)(_command)
app.command("list", rich_help_panel=_AGENTS)(fleet.list_)
app.add_typer(files.app, name="files", rich_help_panel=_AGENTS)
app.command(rich_help_panel=_OPERATING)(doctor.doctor)
app.command(rich_help_panel=_OPERATING)(load_test.loadtest)
_GROUPS = {
    "blobs": blobs, "config": configuration, "image": image, "keys": keys, "store": store, "tokens": tokens,
}  # fmt: skip
for _name, _group in _GROUPS.items():
    app.add_typer(_group.app, name=_name, rich_help_panel=_OPERATING)


def main() -> None:
    """Run the command. Expected errors (an invalid setting, an address in use) print one line and exit with code 2."""
    from hypercore_agents.cli.command_errors import explained

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # other encodings print escapes instead of a traceback
            stream.reconfigure(errors="backslashreplace")
    with explained():
        app()


@app.callback()
def version(
    context: typer.Context,
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Run the Claude Agent SDK for thousands of users, one sandbox per agent."""
    if show:
        from hypercore_agents import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand in _CONFIGURED:
        from hypercore_agents.cli import env_file

        env_file.check()
    if context.invoked_subcommand in _ROLES:
        from hypercore_agents.cli import secret_files

        secret_files.check()


@app.command()
def up(
    demo: Annotated[
        bool, typer.Option(help="Use the built-in simulator of the Claude API when no key is set.")
    ] = False,
    detach: Annotated[
        bool, typer.Option(help="Return once everything is healthy; keep it running in the background.")
    ] = False,
    backend: Annotated[
        str | None,
        typer.Option(help="Where agents run: auto, process or microvm. Default: COMPUTE_BACKEND, else auto."),
    ] = None,
    monitoring: Annotated[
        bool, typer.Option(help="Also run Prometheus and Alertmanager, if installed, with the shipped rules.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run everything on this machine.

    Starts the gateway, the manager, the autoscaler and a small pool of agents. With --json, prints one object with the
    address when everything is ready.
    """
    from hypercore_agents.cli import up as command

    command.up(demo=demo, detached=detach, backend=backend, monitored=monitoring, as_json=as_json)


@app.command()
def down(
    purge: Annotated[bool, typer.Option(help="Also delete the state: database, sealed keys, logs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stop everything that `up` runs, agents included.

    Returns after all processes have ended.
    """
    from hypercore_agents.cli import up as command

    command.down(purge=purge, as_json=as_json)


@app.command()
def manager() -> None:
    """Run the control plane and front door.

    Listens on LISTEN_ADDR (default 127.0.0.1:8080) in WORKER_COUNT processes.
    """
    from hypercore_agents.manager.settings import ManagerSettings
    from hypercore_agents.manager.workers import serve

    serve(ManagerSettings())


@app.command()
def gateway() -> None:
    """Run the model gateway, the only way out of sandboxes.

    Listens on GATEWAY_ADDR (default 127.0.0.1:8090).
    """
    import uvloop

    from hypercore_agents.gateway.app import run
    from hypercore_agents.gateway.settings import GatewaySettings

    uvloop.run(run(GatewaySettings()))


@app.command()
def autoscaler() -> None:
    """Run the autoscaler, which sets the size of the pool.

    Listens on AUTOSCALER_ADDR (default 127.0.0.1:8091).
    """
    import uvloop

    from hypercore_agents.autoscaler.app import run
    from hypercore_agents.autoscaler.settings import AutoscalerSettings

    uvloop.run(run(AutoscalerSettings()))


@app.command()
def agent() -> None:
    """Run the agent server.

    A compute backend starts it inside a sandbox; do not run it by hand.
    """
    import uvloop

    from hypercore_agents.agent.server.app import run
    from hypercore_agents.agent.settings import AgentSettings

    uvloop.run(run(AgentSettings()))


@app.command()
def simulator(
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Listen address.  [127.0.0.1:8099]")] = None,
    workers: Annotated[int | None, typer.Option(help="Number of processes; use 2 or more for 10,000 streams.")] = None,
    ttft: Annotated[float | None, typer.Option(help="Seconds to the first token.")] = None,
    rate: Annotated[float | None, typer.Option(help="Tokens per second; 0 sends all tokens at once.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Length of default answers, in tokens.")] = None,
    fault: Annotated[str | None, typer.Option(help="Fail every request, e.g. '529 times=2', 'cut after=5'.")] = None,
    record: Annotated[bool | None, typer.Option(help="Keep requests for GET /simulator/requests.")] = None,
) -> None:
    """Run a stand-in for the Claude API.

    Configured by flags or SIMULATOR_* variables; see docs/simulator.md.
    """
    from hypercore_agents.simulator.serve import serve
    from hypercore_agents.simulator.settings import SimulatorSettings

    given = {"listen": listen, "workers": workers, "ttft": ttft, "rate": rate, "tokens": tokens, "fault": fault}
    settings: dict[str, Any] = {name: value for name, value in {**given, "record": record}.items() if value is not None}
    serve(SimulatorSettings(**settings), announce=lambda url: typer.echo(f"the simulator answers at {url}", err=True))


if __name__ == "__main__":
    main()
