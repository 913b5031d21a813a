"""What a body may ask of the Claude API, and what is rewritten in it: pure functions of passed values.

A sandbox's tools can read the session token and call the gateway themselves, so that every limit holds here or
nowhere. What is not listed is refused, never dropped in silence:

- fields of the body: `FIELDS`. Others cost more (`service_tier`, `speed`), run code or reach out on the API's side
  (`container`, `mcp_servers`), or belong to betas that are refused.
- sources of content: files of the key's owner (`file_id`), and URLs, which the API would fetch: a way out of a
  sandbox that has none.
- tools that the API runs itself, and betas (`CLI_BETAS`), unless the operator lists them.

The body is parsed and written anew, so that what was checked is what the API reads (duplicate keys).

Rewritten: `metadata` says a pseudonym of the user and nothing else; `max_tokens` is capped at what the turn and the
budget leave. A forced `temperature` excludes thinking by the API's rules, so thinking, and the context edit that needs
it, are taken out.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json, to_json

from hypercore_agents.api.errors import Forbidden, InvalidRequest
from hypercore_agents.api.text import replace_lone_surrogates

CLI_BETAS = frozenset(
    (
        "advanced-tool-use-2025-11-20",
        "claude-code-20250219",
        "context-management-2025-06-27",
        "effort-2025-11-24",
        "interleaved-thinking-2025-05-14",
        "mid-conversation-tool-changes-2026-07-01",
        "per-turn-control-2026-07-01",
        "thinking-display-updates-2026-08-18",
        "thinking-token-count-2026-05-13",
        "token-counting-2024-11-01",
    )
)
"""What the Claude CLI 2.1.330 sends by itself. Found by recording its requests on loopback under twenty settings:
default, bare and minimal; seven models; thinking on, off, adaptive; effort; a budget; an output schema; partial
messages; web tools; bearer and key. `token-counting` belongs to `count_tokens` in its client library."""

LONG_CONTEXT_BETA = "context-1m-2025-08-07"
"""Sent by the CLI when the model's name ends with `[1m]`; admitted when the session's does."""

FIELDS = frozenset(
    (
        "cache_control",
        "context_management",
        "max_tokens",
        "messages",
        "metadata",
        "model",
        "output_config",
        "output_format",
        "stop_sequences",
        "stream",
        "system",
        "temperature",
        "thinking",
        "tool_choice",
        "tools",
        "top_k",
        "top_p",
    )
)
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")
_DATED = re.compile(r"-(\d{8}|latest)$")
_LONG_CONTEXT = "[1m]"
_ALIASES = frozenset(("fable", "haiku", "mythos", "opus", "sonnet"))
_COUNTED = frozenset(
    (
        "cache_control",
        "messages",
        "model",
        "output_config",
        "output_format",
        "system",
        "thinking",
        "tool_choice",
        "tools",
    )
)
_SMALLEST_THINKING = 1024
_DEEPEST = 32


@dataclass(frozen=True)
class Policy:
    """What the operator lets through beyond the defaults."""

    models: tuple[str, ...] = ()
    betas: frozenset[str] = frozenset()
    server_tools: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Wish:
    """What the session is held to. `model` None: any."""

    model: str | None = None
    temperature: float | None = None
    pseudonym: str | None = None
    """Takes the place of `metadata.user_id`, which may be anything: a name, an address, another user's."""


@dataclass
class ModelRequest:
    """An admitted request, still to be capped."""

    model: str
    stream: bool
    body: dict[str, Any] = field(repr=False)
    most_input: int | None = None
    """`bounds.most_input_tokens` of it, where that was computed already."""
    _encoded: bytes | None = field(default=None, repr=False)

    def encoded(self) -> bytes:
        """Return the body as it goes to the API."""
        if self._encoded is None:
            self._encoded = to_json(self.body)
        return self._encoded

    def take(self) -> bytes:
        """Return the body as it goes to the API, and let go of it: the request cannot be encoded again."""
        taken, self._encoded, self.body = self.encoded(), None, {}
        return taken

    def to_count(self) -> bytes:
        """Return the body of a request for the number of its input tokens: what `count_tokens` takes of it.

        Without `context_management`, which can only make it fewer.
        """
        return to_json({name: value for name, value in self.body.items() if name in _COUNTED})

    def blocks(self) -> Iterator[dict[str, Any]]:
        """Give every content block of the system prompt and of the messages, nested ones too."""
        return (block for _, block in _places(self.body))

    def set(self, name: str, value: Any) -> None:
        """Change a field of the body."""
        self.body[name] = value
        self._encoded = None


def admit(raw: bytes, wish: Wish, policy: Policy, *, counting: bool = False) -> ModelRequest:
    """Check a body of `/v1/messages` (or of `/count_tokens`), and rewrite what the session is held to.

    Raises InvalidRequest (not a request of that kind) or Forbidden (a request that is not let through).
    """
    body = _parse(raw)
    for name in body:
        if name not in FIELDS:
            raise Forbidden(f"{name[:64]!r} is not let through by this gateway", details={"field": name[:64]})
    model = body.get("model")
    if not isinstance(model, str) or MODEL_NAME.fullmatch(model) is None:
        raise InvalidRequest("model must be the name of a Claude model", field="model")
    if not model_allowed(model, wish.model, policy.models):
        raise Forbidden(
            f"this session may not use model {model}; it has {wish.model}, and the operator may list more in "
            "ALLOWED_MODELS",
            details={"field": "model"},
        )
    maximum = body.get("max_tokens")
    if not counting and (not isinstance(maximum, int) or isinstance(maximum, bool) or maximum < 1):
        raise InvalidRequest("max_tokens must be a whole number from 1", field="max_tokens")
    if not isinstance(body.get("stream", False), bool):
        raise InvalidRequest("stream must be true or false", field="stream")
    _check_tools(body.get("tools"), policy)
    _check_content(body)
    if "metadata" in body and wish.pseudonym is not None:
        body["metadata"] = {"user_id": wish.pseudonym}
    if wish.temperature is not None and not counting:
        body["temperature"] = wish.temperature
        body.pop("top_p", None)
        _without_thinking(body)
    return ModelRequest(model, bool(body.get("stream", False)) and not counting, body)


def cap_output(request: ModelRequest, limit: int) -> None:
    """Let the request produce at most `limit` tokens (at least 1); a thinking budget is made to fit."""
    body = request.body
    if body["max_tokens"] <= limit:
        return
    request.set("max_tokens", limit)
    thinking = body.get("thinking")
    if isinstance(thinking, dict) and isinstance(budget := thinking.get("budget_tokens"), int) and budget >= limit:
        if limit > _SMALLEST_THINKING:
            request.set("thinking", {**thinking, "budget_tokens": max(_SMALLEST_THINKING, limit // 2)})
        else:
            _without_thinking(body)


def check_betas(header: str | None, wish: Wish, policy: Policy) -> str | None:
    """Return the `anthropic-beta` header to send. Raises Forbidden for one that is not let through."""
    betas = [beta.strip() for beta in (header or "").split(",") if beta.strip()]
    for beta in betas:
        if beta in CLI_BETAS or beta in policy.betas:
            continue
        if beta == LONG_CONTEXT_BETA and wish.model is not None and wish.model.endswith(_LONG_CONTEXT):
            continue
        raise Forbidden(
            f"the beta {beta[:64]!r} is not let through; the operator may list it in ALLOWED_BETAS",
            details={"field": "anthropic-beta"},
        )
    return ",".join(betas) or None


def model_allowed(model: str, wanted: str | None, prefixes: Collection[str] = ()) -> bool:
    """Say whether a session that was given `wanted` (None: whatever it likes) may use `model`.

    A name stands for its dated versions too, an alias such as `sonnet` for its family; `[1m]` only asks for a beta.
    """
    if wanted is None or any(model.startswith(prefix) for prefix in prefixes):
        return True
    name = wanted.removesuffix(_LONG_CONTEXT)
    if name in _ALIASES:
        return f"-{name}-" in f"{model}-"
    return model == name or _DATED.sub("", model) == _DATED.sub("", name)


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        try:
            body = from_json(raw, allow_inf_nan=False)
        except ValueError as error:
            if "hex escape" not in str(error):
                raise
            # It refuses lone surrogates, which the CLI sends where it cut a text in the middle of a character. The API
            # refuses them too, so that the session could never go on.
            body = from_json(
                to_json(replace_lone_surrogates(json.loads(raw.decode(), parse_constant=_refuse_constant)))
            )
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError) or "recursion" in str(error) or "depth" in str(error)
        raise InvalidRequest("the body is nested too deeply" if deep else "the body is not JSON") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    return body


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _check_tools(tools: Any, policy: Policy) -> None:
    if tools is None:
        return
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidRequest("tools must be a list of objects", field="tools")
    for number, tool in enumerate(tools):
        kind = tool.get("type")
        if kind is not None and not isinstance(kind, str):
            raise InvalidRequest(f"tools.{number}.type must be a string", field=f"tools.{number}.type")
        if kind is not None and kind != "custom" and kind not in policy.server_tools:
            raise Forbidden(
                f"tools.{number} has type {str(kind)[:64]!r}: the API's own tools are not let through; the operator "
                "may list the type in ALLOWED_SERVER_TOOLS",
                details={"field": f"tools.{number}.type"},
            )


def _check_content(body: dict[str, Any]) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InvalidRequest("messages must be a list of objects", field="messages")
    for place, block in _places(body):
        source = block.get("source")
        kinds = (block.get("type"), source.get("type") if isinstance(source, dict) else None)  # of any type
        if "file_id" in block or (isinstance(source, dict) and "file_id" in source) or "container_upload" in kinds:
            raise Forbidden(f"{place} names a file stored at the API: send its content", details={"field": place})
        if isinstance(source, dict) and (source.get("type") == "url" or "url" in source):
            raise Forbidden(f"{place} has a URL for the API to fetch: send its content", details={"field": place})


def _places(body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give every content block with where it is."""
    for block in _blocks(body.get("system"), "system"):
        yield "system", block
    for number, message in enumerate(body["messages"]):
        place = f"messages.{number}"
        for block in _blocks(message.get("content"), place):
            yield place, block


def _blocks(content: Any, place: str, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Give every content block, those inside tool results and documents too; not what a tool was given as input."""
    if not isinstance(content, list):
        return
    if depth > _DEEPEST:
        raise InvalidRequest(f"{place} is nested too deeply", field=place)
    for block in content:
        if isinstance(block, dict):
            yield block
            source = block.get("source")
            yield from _blocks(block.get("content"), place, depth + 1)
            if isinstance(source, dict):
                yield from _blocks(source.get("content"), place, depth + 1)


def _without_thinking(body: dict[str, Any]) -> None:
    body.pop("thinking", None)
    management = body.get("context_management")
    if not isinstance(management, dict) or not isinstance(management.get("edits"), list):
        return
    edits = [
        edit
        for edit in management["edits"]
        if not (isinstance(edit, dict) and str(edit.get("type")).startswith("clear_thinking"))
    ]
    if edits:
        body["context_management"] = {**management, "edits": edits}
    else:
        del body["context_management"]
