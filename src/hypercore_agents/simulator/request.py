"""Validate the body of `POST /v1/messages` and `/count_tokens` as the API does.

Errors name the field by its path (`messages.1.content.0.text: ...`). Besides types, the validation covers the rules
that a client breaks when it loses or reorders part of a transcript: every tool_use has a tool_result in the next user
message, every tool_result belongs to a tool_use, no text is empty. Unknown top-level fields are rejected, as the API
does; content blocks of types that the simulator does not interpret (images, documents, thinking) are not validated.
"""

import json
import math
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hypercore_agents.simulator.failures import ApiFailure, invalid


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Block(BaseModel):
    """A content block: its type and the fields of that type."""

    model_config = ConfigDict(extra="allow")

    type: str

    def get(self, name: str) -> Any:
        """Return a field of this block, or None."""
        return (self.__pydantic_extra__ or {}).get(name)


Blocks = Annotated[list[Block], BeforeValidator(_as_blocks)]


class Message(BaseModel):
    """One message of the conversation. The CLI adds instructions as messages with the role `system`."""

    model_config = ConfigDict(extra="allow")

    role: Literal["user", "assistant", "system"]
    content: Blocks


class CountRequest(BaseModel):
    """The fields for counting tokens, and those that do not change the simulator's answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(min_length=1, max_length=256)
    messages: list[Message] = Field(min_length=1)
    system: Blocks = Field(default_factory=list)
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    cache_control: Any = None
    context_management: Any = None
    mcp_servers: Any = None
    speed: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None


class MessagesRequest(CountRequest):
    """A request for a message."""

    max_tokens: int = Field(ge=1)
    stream: bool = False
    stop_sequences: list[str] = Field(default_factory=list)
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    betas: Any = None
    billing_policy: Any = None
    compaction: Any = None
    container: Any = None
    diagnostics: Any = None
    fallback_credit_token: Any = None
    fallbacks: Any = None
    inference_geo: Any = None
    thread: Any = None


Body = TypeVar("Body", bound=CountRequest)


def read_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object in `body`. Raises ApiFailure (400)."""
    try:
        value = json.loads(body.decode(), parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise ApiFailure(400, f"The request body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiFailure(400, "The request body is not a JSON object")
    return value


def read_messages(body: dict[str, Any]) -> MessagesRequest:
    """Validate a body of `/v1/messages`. Raises ApiFailure (400, or 404 for a model that does not exist)."""
    return _checked(_validated(MessagesRequest, body))


def read_count(body: dict[str, Any]) -> CountRequest:
    """Validate a body of `/v1/messages/count_tokens`. Raises ApiFailure."""
    return _checked(_validated(CountRequest, body))


def input_tokens(body: dict[str, Any]) -> int:
    """Count tokens: one for every 4 characters, or part of 4, of the compact JSON of system, messages and tools."""
    prompt = {name: body[name] for name in ("system", "messages", "tools") if name in body}
    return math.ceil(len(json.dumps(prompt, ensure_ascii=False, separators=(",", ":"))) / 4)


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _validated(model: type[Body], body: dict[str, Any]) -> Body:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        problem = {"missing": "Field required", "extra_forbidden": "Extra inputs are not permitted"}
        raise invalid(field, problem.get(first["type"], first["msg"])) from error


def _checked(request: Body) -> Body:
    if not request.model.startswith("claude-"):
        raise ApiFailure(404, f"model: {request.model}")
    for number, tool in enumerate(request.tools):
        if not isinstance(tool.get("name"), str) and tool.get("type", "custom") == "custom":
            raise invalid(f"tools.{number}.name", "Field required")
        if tool.get("type", "custom") == "custom" and not isinstance(tool.get("input_schema"), dict):
            raise invalid(f"tools.{number}.input_schema", "Field required")
    if request.messages[0].role == "assistant":
        raise invalid("messages.0.role", "the first message must be the user's")
    pending: dict[str, str] = {}
    previous = ""
    for number, message in enumerate(request.messages):
        where = f"messages.{number}.content"
        last = number == len(request.messages) - 1
        if not message.content and not (last and message.role == "assistant"):
            raise invalid(where, "all messages must have non-empty content except for the optional final assistant one")
        if message.role == "assistant" and previous == "user":
            _check_all_answered(pending)
        for index, block in enumerate(message.content):
            _check_block(block, f"{where}.{index}", message.role, pending)
        if message.role != "system":
            previous = message.role
    if previous == "user":
        _check_all_answered(pending)
    return request


def _check_block(block: Block, where: str, role: str, pending: dict[str, str]) -> None:
    if block.type == "text":
        text = block.get("text")
        if not isinstance(text, str):
            raise invalid(f"{where}.text", "Field required")
        if not text:
            raise invalid(where, "text content blocks must be non-empty")
    elif block.type == "tool_use":
        if role != "assistant":
            raise invalid(where, "`tool_use` blocks can only be in `assistant` messages")
        if not isinstance(block.get("id"), str) or not isinstance(block.get("name"), str):
            raise invalid(f"{where}.id", "a tool_use has an id and a name, both strings")
        if not isinstance(block.get("input"), dict):
            raise invalid(f"{where}.input", "Input should be an object")
        pending[block.get("id")] = where
    elif block.type == "tool_result":
        if role != "user":
            raise invalid(where, "`tool_result` blocks can only be in `user` messages")
        identity = block.get("tool_use_id")
        if not isinstance(identity, str):
            raise invalid(f"{where}.tool_use_id", "Field required")
        if pending.pop(identity, None) is None:
            raise invalid(
                where,
                f"unexpected `tool_use_id` found in `tool_result` blocks: {identity}. Each `tool_result` block must "
                "have a corresponding `tool_use` block in the previous message.",
            )
        if not isinstance(block.get("content"), str | list | None):
            raise invalid(f"{where}.content", "Input should be a string or a list of blocks")


def _check_all_answered(pending: dict[str, str]) -> None:
    if pending:
        identity, where = next(iter(pending.items()))
        raise invalid(
            where,
            f"`tool_use` ids were found without `tool_result` blocks immediately after: {identity}. Each `tool_use` "
            "block must have a corresponding `tool_result` block in the next message.",
        )
