"""`spawn`, `list`, `get`, `delete`, `stats`, `logs`: agents, over the manager's HTTP API; `get` shows sessions too."""

import json
import sys
import uuid
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.cli.remote import (
    AsJson,
    Url,
    User,
    default_user,
    manager,
    printable,
    show_json,
    show_table,
    waiting,
)

if TYPE_CHECKING:
    from hypercore_agents.api.agents import AgentView, HostView, ShareView
    from hypercore_agents.api.history import SessionDetail

_AgentId = Annotated[str, typer.Argument(metavar="AGENT_ID")]
LOG_WINDOW = 262_144


def spawn(
    user: User = None,
    cores: Annotated[int | None, typer.Option(help="Virtual CPUs.")] = None,
    memory: Annotated[int | None, typer.Option(help="MB.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Maximum number of sessions.")] = None,
    timeout: Annotated[int | None, typer.Option(help="Seconds per turn.")] = None,
    model: Annotated[str | None, typer.Option(help="Claude model.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="System prompt of all its sessions.")] = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Tag; repeatable.")] = None,
    options: Annotated[
        str | None, typer.Option(metavar="JSON", help="More fields of the spawn body, as a JSON object.")
    ] = None,
    key_from_stdin: Annotated[
        bool, typer.Option("--key-stdin", help="Read the Claude API key of this agent from standard input.")
    ] = False,
    wait: Annotated[bool, typer.Option(help="Return when the agent is ready.")] = True,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Start a dedicated agent of one user."""
    given: dict[str, Any] = {
        "cores": cores, "memory": memory, "max_concurrent": max_concurrent, "timeout": timeout, "model": model,
        "system_prompt": system_prompt, "tags": _tags(tag) or None,
        "anthropic_api_key": sys.stdin.readline().strip() if key_from_stdin else None,
    }  # fmt: skip
    body: Any = {**json_object(options, "--options"), **{k: v for k, v in given.items() if v is not None}}
    with manager(url) as client:
        with waiting("starting an agent …", quiet=as_json):
            agent = client.spawn(user or default_user(), wait=wait, **body)
        if as_json:
            show_json(agent)
        else:
            _show_agent(agent)


def list_(
    user: Annotated[str | None, typer.Option(metavar="ID", help="Only this user.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List live agents, oldest first."""
    with manager(url) as client:
        listed = client.agents(user)
        if as_json:
            show_json(listed)
            return
        columns = ("AGENT", "KIND", "USER", "STATUS", "SESSIONS", "CORES", "MEMORY", "TOOLS", "SINCE")
        rows = [
            (a.agent_id, a.kind, a.user_id, a.status, f"{a.sessions}/{a.max_concurrent}", a.cores, f"{a.memory} MB",
             "on" if a.tools else "off", a.created_at)
            for a in listed.agents
        ]  # fmt: skip
        show_table(columns, rows, empty="no agents; start one with: hypercore-agents spawn")


def get(
    name: Annotated[str, typer.Argument(metavar="AGENT_ID|SESSION_ID")],
    history: Annotated[
        int | None, typer.Option(min=0, max=200, help="Number of newest messages of a session to show; default 20.")
    ] = None,
    before: Annotated[
        int | None,
        typer.Option(min=1, help="Show messages before this one: the value of history_next in the previous answer."),
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show one agent, or one session with its conversation.

    Works for ended agents too. For a session: state, usage, cost and its newest messages.
    """
    of_session = _is_session(name)
    if not of_session and (history, before) != (None, None):
        raise CommandError("--history and --before are for a session")
    with manager(url) as client:
        if of_session:
            from hypercore_agents.api.history import HISTORY_PAGE

            session = client.session(name, history=HISTORY_PAGE if history is None else history, before=before)
            if as_json:
                show_json(session)
            else:
                _show_session(session)
            return
        agent = client.agent(name)
        if as_json:
            show_json(agent)
        else:
            _show_agent(agent)


def delete(agent_id: _AgentId, url: Url = None, as_json: AsJson = False) -> None:
    """Stop an agent and end its sessions.

    Returns after its sandbox is removed.
    """
    with manager(url) as client:
        with waiting("stopping the agent …", quiet=as_json):
            done = client.delete_agent(agent_id)
        if as_json:
            show_json(done)
        else:
            typer.echo(f"{done.agent_id} is {done.status}")


def stats(url: Url = None, as_json: AsJson = False) -> None:
    """Count agents, sessions and capacity, and show usage per user."""
    with manager(url) as client:
        counted = client.stats()
        if as_json:
            show_json(counted)
            return
        pool = counted.pool
        rows = [
            ("agents", counted.total_agents),
            ("users", counted.users),
            ("sessions", f"{counted.sessions} of {counted.capacity}"),
            (
                "pool",
                f"{pool.running} running, {pool.desired} desired, {pool.starting} starting, {pool.draining} draining",
            ),
            ("turns waiting", f"{pool.waiting}, for {_seconds(pool.queue_wait_seconds)}"),
            ("start wait", _seconds(pool.start_wait_seconds)),
            *((f"agents of {user}", count) for user, count in counted.agents_per_user.items()),
            *_shares(counted.shares),
            *(_host_memory(counted.host) if counted.host is not None else ()),
        ]
        show_table(("WHAT", "NOW"), rows, empty="")


def _host_memory(host: "HostView") -> list[tuple[str, str]]:
    """Return rows on the host's memory: the memory given to agents, and the memory in use where it is measured."""
    rows = [("memory given", f"{host.memory_used_mb} of {host.memory_mb} MB")]
    if host.memory_charged_mb is None:
        return rows
    rows.append(("memory used", f"{host.memory_charged_mb} MB"))
    parts = {"templates": host.templates_memory, **host.agents_memory}
    rows += [
        (f"memory of {name}", f"{part.charged_mb} MB used, {part.given_mb} MB allocated")
        for name, part in parts.items()
        if part is not None
    ]
    return rows


def logs(
    agent_id: _AgentId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow until Ctrl-C or the end of the agent.")
    ] = False,
    tail: Annotated[int, typer.Option(min=1, max=10_000, help="Number of last lines to print first.")] = 100,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Print the log of an agent's server.

    With --follow and --json, prints one object per line. The log is removed with its agent, so the last lines before
    its end can be missing.
    """
    shown = printable if sys.stdout.isatty() else str  # the log can contain control characters
    with manager(url) as client:
        if follow:
            for line in client.follow_logs(agent_id, tail=tail):
                text = json.dumps({"agent_id": agent_id, "line": line}, ensure_ascii=False) if as_json else shown(line)
                sys.stdout.write(f"{text}\n")
                sys.stdout.flush()
            return
        printed = client.logs(agent_id, limit=LOG_WINDOW).removesuffix("\n")
        lines = printed.split("\n")[-tail:] if printed else []
        if as_json:
            show_json({"agent_id": agent_id, "lines": lines})
            return
        sys.stdout.writelines(f"{shown(line)}\n" for line in lines)


def _seconds(wait: float | None) -> str:
    return "unknown" if wait is None else f"{wait:.1f} s"


def _shares(shares: "dict[str, ShareView]") -> list[tuple[str, str]]:
    """Return a row for each user of each share, and one row for each unused share."""
    rows = []
    for name, share in shares.items():
        shown = _megabytes if name == "stored_bytes" else str
        what = "storage" if name == "stored_bytes" else name.replace("_", " ")
        of = "" if share.limit is None else f" of {shown(share.limit)}"
        rows += [(f"{what} of {user}", f"{shown(used)}{of}") for user, used in share.used.items()]
        if not share.used:
            rows.append((what, f"none in use{of and f'; a user may have {shown(share.limit or 0)}'}"))
    return rows


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MB"


def json_object(text: str | None, option: str) -> dict[str, Any]:
    """Return the JSON object of an option. Raises CommandError."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CommandError(f"{option} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CommandError(f"{option} must be a JSON object, like '{{\"max_turns\": 3}}'")
    return value


def _tags(given: list[str] | None) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in given or ()]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise CommandError(f"--tag must be KEY=VALUE, not {wrong[0]!r}")
    return {key: value for key, _, value in pairs}


def _show_agent(agent: "AgentView") -> None:
    shown = agent.model_dump(mode="json")
    show_table(
        ("FIELD", "VALUE"), [(name, value) for name, value in shown.items() if value not in (None, {})], empty=""
    )


def _is_session(name: str) -> bool:
    try:
        uuid.UUID(name)
    except ValueError:
        return False
    return True


def _show_session(session: "SessionDetail") -> None:
    shown = session.model_dump(mode="json", exclude={"history", "history_next", "usage"})
    usage = session.usage
    shown["tokens"] = f"{usage.total_tokens} ({usage.input_tokens} in, {usage.output_tokens} out)"
    shown["cost"] = f"{usage.cost_usd:.6f} USD"
    show_table(("FIELD", "VALUE"), [(name, value) for name, value in shown.items() if value is not None], empty="")
    if session.history_next is not None:
        sys.stdout.write(f"\n(earlier messages: --before {session.history_next})\n")
    for message in session.history:
        parts = [message.text] if message.text else []
        parts += [f"calls {call.name} {call.input}" for call in message.tool_uses]
        parts += [f"{'error' if outcome.error else 'result'}: {outcome.text}" for outcome in message.tool_results]
        head = " ".join(filter(None, (message.role, message.at, "(shortened)" if message.shortened else "")))
        lines = "\n".join(parts).splitlines()
        sys.stdout.write(f"\n{head}\n" + "".join(f"  {printable(line)}\n" for line in lines))
