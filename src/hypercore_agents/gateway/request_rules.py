"""Rules for the bodies of model requests: what a session may request from the Claude API, and what is rewritten.

A sandbox's tools can read the session token and call the gateway themselves, so every limit must be enforced here.
Whatever is not listed is rejected, never dropped silently:

- fields of the body: `FIELDS`. Others cost more (`service_tier`, `speed`), run code or connect from the API's side
  (`container`, `mcp_servers`), or belong to betas that are rejected.
- sources of content: files of the key's owner (`file_id`), and URLs, which the API would fetch: a way for data to leave
  a sandbox that has no network.
- tools that the API runs itself, and betas (`CLI_BETAS`), unless the operator lists them.

The body is parsed and encoded again, so that the API reads exactly what was checked (duplicate keys).

Rewritten: `metadata` contains only a pseudonym of the user; `max_tokens` is capped at what the turn and the budget have
left. By the API's rules a fixed `temperature` excludes thinking, so thinking is removed, with the context edit that
needs it. All functions are pure.
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
"""The betas that the Claude CLI 2.1.330 sends by default. Found by recording its requests on loopback with twenty
settings: default, bare and minimal; seven models; thinking on, off, adaptive; effort; a budget; an output schema;
partial messages; web tools; bearer and key. Its client library sends `token-counting` with `count_tokens`."""

LONG_CONTEXT_BETA = "context-1m-2025-08-07"
"""Sent by the CLI if the model's name ends with `[1m]`; allowed if the name of the session's model does."""

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
    """What the operator allows in addition to the defaults."""

    models: tuple[str, ...] = ()
    betas: frozenset[str] = frozenset()
    server_tools: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SessionRules:
    """The rules of a session. `model` None: any model."""

    model: str | None = None
    temperature: float | None = None
    pseudonym: str | None = None
    """Replaces `metadata.user_id`, which may contain anything: a name, an address, another user's id."""


@dataclass
class ModelRequest:
    """A request that passed the rules, before it is capped."""

    model: str
    stream: bool
    body: dict[str, Any] = field(repr=False)
    max_input_tokens: int | None = None
    """Result of `input_bounds.max_input_tokens`, if already computed."""
    _encoded: bytes | None = field(default=None, repr=False)

    def encoded(self) -> bytes:
        """Return the body as it is sent to the API."""
        if self._encoded is None:
            self._encoded = to_json(self.body)
        return self._encoded

    def take(self) -> bytes:
        """Return the body as it is sent to the API, and free it: the request cannot be encoded again."""
        taken, self._encoded, self.body = self.encoded(), None, {}
        return taken

    def to_count(self) -> bytes:
        """Return the fields that `count_tokens` accepts, encoded.

        Without `context_management`, which can only lower the count.
        """
        return to_json({name: value for name, value in self.body.items() if name in _COUNTED})

    def blocks(self) -> Iterator[dict[str, Any]]:
        """Yield every content block of the system prompt and of the messages, including nested ones."""
        return (block for _, block in _places(self.body))

    def set(self, name: str, value: Any) -> None:
        """Change a field of the body."""
        self.body[name] = value
        self._encoded = None


def apply_rules(raw: bytes, rules: SessionRules, policy: Policy, *, counting: bool = False) -> ModelRequest:
    """Check a body of `/v1/messages` (or of `/count_tokens`), and rewrite it by the session's rules.

    Raises InvalidRequest (not a valid request) or Forbidden (a request that is not allowed).
    """
    body = _parse(raw)
    for name in body:
        if name not in FIELDS:
            raise Forbidden(f"this gateway does not allow the field {name[:64]!r}", details={"field": name[:64]})
    model = body.get("model")
    if not isinstance(model, str) or MODEL_NAME.fullmatch(model) is None:
        raise InvalidRequest("model must be the name of a Claude model", field="model")
    if not model_allowed(model, rules.model, policy.models):
        raise Forbidden(
            f"this session may not use model {model}; its model is {rules.model}, and the operator can allow others "
            "with ALLOWED_MODELS",
            details={"field": "model"},
        )
    maximum = body.get("max_tokens")
    if not counting and (not isinstance(maximum, int) or isinstance(maximum, bool) or maximum < 1):
        raise InvalidRequest("max_tokens must be an integer of at least 1", field="max_tokens")
    if not isinstance(body.get("stream", False), bool):
        raise InvalidRequest("stream must be true or false", field="stream")
    _check_tools(body.get("tools"), policy)
    _check_content(body)
    if "metadata" in body and rules.pseudonym is not None:
        body["metadata"] = {"user_id": rules.pseudonym}
    if rules.temperature is not None and not counting:
        body["temperature"] = rules.temperature
        body.pop("top_p", None)
        _without_thinking(body)
    return ModelRequest(model, bool(body.get("stream", False)) and not counting, body)


def cap_output(request: ModelRequest, limit: int) -> None:
    """Cap the request's output at `limit` tokens (at least 1); reduce its thinking budget to fit."""
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


def check_betas(header: str | None, rules: SessionRules, policy: Policy) -> str | None:
    """Return the `anthropic-beta` header to send. Raises Forbidden for a beta that is not allowed."""
    betas = [beta.strip() for beta in (header or "").split(",") if beta.strip()]
    for beta in betas:
        if beta in CLI_BETAS or beta in policy.betas:
            continue
        if beta == LONG_CONTEXT_BETA and rules.model is not None and rules.model.endswith(_LONG_CONTEXT):
            continue
        raise Forbidden(
            f"the beta {beta[:64]!r} is not allowed; the operator can allow it with ALLOWED_BETAS",
            details={"field": "anthropic-beta"},
        )
    return ",".join(betas) or None


def model_allowed(model: str, wanted: str | None, prefixes: Collection[str] = ()) -> bool:
    """Return whether a session with the model `wanted` (None: any) may use `model`.

    A name includes its dated versions, an alias such as `sonnet` its family; `[1m]` only selects a beta.
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
            # `from_json` rejects lone surrogates, which the CLI sends if it cut a text within a character. The API
            # rejects them too, which would block the session for good.
            body = from_json(
                to_json(replace_lone_surrogates(json.loads(raw.decode(), parse_constant=_refuse_constant)))
            )
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError) or "recursion" in str(error) or "depth" in str(error)
        raise InvalidRequest("the body is nested too deeply" if deep else "the body is not valid JSON") from None
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
                f"tools.{number} has type {str(kind)[:64]!r}: tools run by the API are not allowed; the operator can "
                "allow the type with ALLOWED_SERVER_TOOLS",
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
            raise Forbidden(f"{place} refers to a file stored at the API: send its content", details={"field": place})
        if isinstance(source, dict) and (source.get("type") == "url" or "url" in source):
            raise Forbidden(f"{place} has a URL for the API to fetch: send its content", details={"field": place})


def _places(body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every content block with its location."""
    for block in _blocks(body.get("system"), "system"):
        yield "system", block
    for number, message in enumerate(body["messages"]):
        place = f"messages.{number}"
        for block in _blocks(message.get("content"), place):
            yield place, block


def _blocks(content: Any, place: str, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Yield every content block, including those inside tool results and documents, but not inside a tool's input."""
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
