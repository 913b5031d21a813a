"""`usage`: tokens and cost from the gateway's ledger."""

from typing import Annotated

import typer

from hypercore_agents.cli.remote import AsJson, Url, manager, show_json, show_table

_Day = Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="Day in UTC, inclusive.")]


def usage(
    user: Annotated[str | None, typer.Option(metavar="ID", help="Only this user.")] = None,
    since: _Day = None,
    until: _Day = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Sum tokens and cost by day, user, agent and model."""
    with manager(url) as client:
        report = client.usage(user, since=since, until=until)
        if as_json:
            show_json(report)
            return
        columns = ("DAY", "USER", "AGENT", "MODEL", "REQUESTS", "INPUT", "OUTPUT", "COST USD")
        rows: list[tuple[object, ...]] = [
            (r.day, r.user_id, r.agent_id, r.model, r.requests, r.input_tokens, r.output_tokens, f"{r.cost_usd:.6f}")
            for r in report.rows
        ]
        if rows:
            total = report.total
            requests = sum(row.requests for row in report.rows)
            rows.append(("all", "", "", "", requests, total.input_tokens, total.output_tokens, f"{total.cost_usd:.6f}"))
        show_table(columns, rows, empty="nothing was used")
        if report.stored_bytes is not None:
            limit = "" if report.stored_bytes_limit is None else f" of {report.stored_bytes_limit / 2**20:.0f} MB"
            typer.echo(f"archived workspaces: {report.stored_bytes / 2**20:.1f} MB{limit}")
