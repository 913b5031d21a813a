"""The calls of the HTTP API as values: method, path, body and the model of the answer. No I/O.

Options have the names of the API (`api.options`). Only the server validates them, so client and server may have
different versions.
"""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypedDict, TypeVar
from urllib.parse import quote, urlencode

from pydantic import BaseModel, ValidationError

from hypercore_agents.api.agents import AgentDeleted, AgentList, AgentView, StatsView
from hypercore_agents.api.approvals import ApprovalResolved
from hypercore_agents.api.chat import ChatResponse, InterruptResponse, SessionDeleted, SessionList
from hypercore_agents.api.events import SessionEvents
from hypercore_agents.api.files import FileDeleted, FileList, FileWritten
from hypercore_agents.api.history import SessionDetail
from hypercore_agents.api.usage import UsageReport
from hypercore_agents.client.errors import Unreachable

T = TypeVar("T", bound=BaseModel)


class _SessionOptions(TypedDict, total=False):
    model: str
    fallback_model: str
    system_prompt: str | dict[str, Any]
    tools: list[str]
    allowed_tools: list[str]
    disallowed_tools: list[str]
    permission_mode: str
    approval_tools: list[str]
    mcp_servers: dict[str, Any]
    agents: dict[str, Any]
    skills: list[str]
    max_turns: int
    max_budget_usd: float
    effort: str
    thinking: dict[str, Any]
    output_schema: dict[str, Any]


class ChatOptions(_SessionOptions, total=False):
    """Optional fields of a chat request."""

    max_tokens: int
    temperature: float
    on_disconnect: str
    when_busy: str


class SpawnOptions(_SessionOptions, total=False):
    """Optional fields of a spawn request."""

    anthropic_api_key: str
    cores: int
    memory: int
    gpu_quota: int
    max_concurrent: int
    timeout: int
    tags: dict[str, str]


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request. `seconds` is the maximum time without any byte of the answer.

    `repeatable`: sending it twice has the effect of sending it once, by its nature or by its `Idempotency-Key`.
    """

    method: str
    path: str
    answer: type[T]
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    seconds: float = 60.0


def chat(
    prompt: str, user_id: str, session_id: str | None, agent_id: str | None, options: Mapping[str, Any], stream: bool
) -> Call[ChatResponse]:
    """Run one turn on the pool or on one agent. It may take an hour, the maximum of a turn."""
    body = {"prompt": prompt, "user_id": user_id, **({"session_id": session_id} if session_id else {}), **options}
    if stream:
        body["stream"] = True
    prefix = f"/agents/{quote(agent_id, safe='')}" if agent_id else ""
    return Call(
        "POST",
        f"{prefix}/v1/agent/chat",
        ChatResponse,
        _json(body),
        {} if stream else {"Idempotency-Key": str(uuid.uuid4())},
        repeatable=not stream,
        seconds=3700.0,
    )


def spawn(user_id: str, options: Mapping[str, Any], wait: bool) -> Call[AgentView]:
    """Start an agent; with `wait`, until it is ready."""
    return Call(
        "POST",
        _path("/v1/agents/spawn", wait=None if wait else "false"),
        AgentView,
        _json({"user_id": user_id, **options}),
        {"Idempotency-Key": str(uuid.uuid4())},
        seconds=600.0,
    )


def agents(user_id: str | None) -> Call[AgentList]:
    """List live agents."""
    return Call("GET", _path("/v1/agents/list", user_id=user_id), AgentList)


def agent(agent_id: str) -> Call[AgentView]:
    """Show one agent."""
    return Call("GET", _path("/v1/agents/get", agent_id=agent_id), AgentView)


def delete_agent(agent_id: str) -> Call[AgentDeleted]:
    """Stop one agent; the answer arrives after its sandbox is removed."""
    return Call("DELETE", _path("/v1/agents/delete", agent_id=agent_id), AgentDeleted, seconds=180.0)


def stats() -> Call[StatsView]:
    """Count agents, sessions and capacity."""
    return Call("GET", "/v1/agents/stats", StatsView)


def usage(user_id: str | None, since: str | None, until: str | None) -> Call[UsageReport]:
    """Read the ledger."""
    return Call("GET", _path("/v1/usage", user_id=user_id, since=since, until=until), UsageReport)


def sessions(user_id: str | None, after: str | None = None, limit: int | None = None) -> Call[SessionList]:
    """List a page of the sessions that have not ended."""
    pages = {"after": after, "limit": None if limit is None else str(limit)}
    return Call("GET", _path("/v1/agent/sessions", user_id=user_id, **pages), SessionList)


def session(session_id: str, history: int, before: int | None) -> Call[SessionDetail]:
    """Show one session and a page of its conversation."""
    path = f"/v1/agent/session/{quote(session_id, safe='')}"
    page = {"history": str(history), "before": None if before is None else str(before)}
    return Call("GET", _path(path, **page), SessionDetail)


def delete_session(session_id: str) -> Call[SessionDeleted]:
    """End one session permanently."""
    return Call("DELETE", f"/v1/agent/session/{quote(session_id, safe='')}", SessionDeleted)


def interrupt(session_id: str) -> Call[InterruptResponse]:
    """Interrupt the running turn."""
    return Call("POST", f"/v1/agent/session/{quote(session_id, safe='')}/interrupt", InterruptResponse)


def resolve_approval(session_id: str, approval_id: str, allow: bool, message: str | None) -> Call[ApprovalResolved]:
    """Allow or deny a waiting tool call."""
    body: dict[str, Any] = {"decision": "allow" if allow else "deny"}
    if message is not None:
        body["message"] = message
    path = f"/v1/agent/session/{quote(session_id, safe='')}/approvals/{quote(approval_id, safe='')}"
    return Call("POST", path, ApprovalResolved, _json(body), repeatable=False)


def files(session_id: str, after: str | None = None, limit: int | None = None) -> Call[FileList]:
    """List a page of a session's workspace."""
    path = f"/v1/agent/session/{quote(session_id, safe='')}/files"
    return Call("GET", _path(path, after=after, limit=None if limit is None else str(limit)), FileList)


def delete_file(session_id: str, path: str) -> Call[FileDeleted]:
    """Delete a file, a link or an empty folder. Not repeatable: a second call finds nothing."""
    return Call(
        "DELETE",
        f"/v1/agent/session/{quote(session_id, safe='')}/files/{quote(path)}",
        FileDeleted,
        repeatable=False,
        seconds=120.0,
    )


def read_file(session_id: str, path: str) -> Call[BaseModel]:
    """Get a file's bytes; the answer is not JSON."""
    return Call("GET", f"/v1/agent/session/{quote(session_id, safe='')}/files/{quote(path)}", BaseModel, seconds=120.0)


def write_file(session_id: str, path: str, content: bytes) -> Call[FileWritten]:
    """Write a file, replacing an existing one."""
    return Call(
        "PUT",
        f"/v1/agent/session/{quote(session_id, safe='')}/files/{quote(path)}",
        FileWritten,
        content,
        {"Content-Type": "application/octet-stream"},
        seconds=120.0,
    )


def session_events(session_id: str, after: str | None, limit: int) -> Call[SessionEvents]:
    """List a page of a session's event log."""
    path = f"/v1/agent/session/{quote(session_id, safe='')}/events"
    return Call("GET", _path(path, after=after, limit=str(limit)), SessionEvents)


def logs(agent_id: str, limit: int) -> Call[BaseModel]:
    """Get the end of an agent's log; the answer is not JSON."""
    return Call("GET", _path("/v1/agents/logs", agent_id=agent_id, limit=str(limit)), BaseModel)


def page(path: str) -> Call[BaseModel]:
    """Get a page that is not JSON."""
    return Call("GET", path, BaseModel)


def events(session_id: str) -> str:
    """Return the path of a session's event stream."""
    return f"/v1/agent/session/{quote(session_id, safe='')}/events/stream"


def answered(call: Call[T], url: str, body: bytes) -> T:
    """Return the parsed answer. Raises Unreachable for an answer of another program."""
    try:
        return call.answer.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "answer"
        problem = f"{call.path.partition('?')[0]}: {field}: {first['msg']}"
        raise Unreachable(f"{url} answers, but it is not this platform ({problem})", sent=True) from error


def headers(call: Call[T], token: str | None, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the headers of a call."""
    headers = {"Accept": "application/json", "User-Agent": "hypercore-agents-client", **call.headers, **(extra or {})}
    if call.body is not None:
        headers.setdefault("Content-Type", "application/json")
    if token:
        headers["Authorization"] = f"Bearer {token}"
    return headers


def _json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _path(path: str, **query: str | None) -> str:
    given = {name: value for name, value in query.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path
