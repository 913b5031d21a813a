"""Options of a session: the options of the Agent SDK that the platform offers."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from hypercore_agents.api.arguments import RULES_BYTES, check_json_size, check_size, split_rules
from hypercore_agents.api.errors import Conflict
from hypercore_agents.api.names import name_of
from hypercore_agents.api.schemas import check_schema
from hypercore_agents.api.text import storable

PermissionMode = Literal["default", "acceptEdits", "plan", "dontAsk", "bypassPermissions"]
_TOOL_PRESETS = frozenset({"default"})
"""Values that the Claude CLI's `--tools` interprets as a set of tools."""
_MODEL_ALIASES = frozenset({"best", "default", "inherit", "opusplan"})
"""Values that let the Claude CLI choose a model, which may differ from the session's."""
_RESERVED_MCP_SERVERS = frozenset({"claude-in-chrome", "computer-use", "ide", "workspace"})
"""Names of the Claude CLI's own MCP servers; it omits the tools of other servers with these names."""


def _tool(value: str) -> str:
    if value in _TOOL_PRESETS:
        raise ValueError(f"{value!r} is not a tool; the Claude CLI would offer all of its tools. Omit tools instead")
    return value


def _model(value: str) -> str:
    if value.removesuffix("[1m]") in _MODEL_ALIASES:
        raise ValueError(
            f"{value!r} lets the Claude CLI choose the model; name one, for example claude-sonnet-4-5, or a family: "
            "haiku, sonnet or opus"
        )
    return value


def _mcp_server(value: str) -> str:
    if value in _RESERVED_MCP_SERVERS:
        raise ValueError(f"{value!r} is reserved by the Claude CLI, which would omit its tools; use another name")
    return value


def _rule(value: str) -> str:
    if split_rules(value) != [value]:
        raise ValueError(
            f"{value[:80]!r} is not one permission rule; the Claude CLI splits rules at commas and spaces outside of "
            "parentheses, and the first `)` ends a specifier. Make each rule a separate entry"
        )
    return value


def _rules(value: list[str]) -> list[str]:
    check_size(",".join(value), RULES_BYTES, "the list of rules")
    return value


_MODEL = name_of(
    r"[a-z0-9][a-z0-9._:/@-]{0,127}(\[1m\])?",
    "1 to 128 of a-z, 0-9 and ._:/@-, beginning with a letter or digit, as in the Claude API; [1m] may follow",
)
ToolName = Annotated[
    str,
    *name_of(
        r"[A-Za-z][A-Za-z0-9_-]{0,127}", "a tool's name: 1 to 128 letters, digits, _ and -, beginning with a letter"
    ),
    AfterValidator(_tool),
]
ToolPattern = Annotated[
    str,
    *name_of(r"[A-Za-z*][A-Za-z0-9_*-]{0,127}", "1 to 128 letters, digits, _, - and *, beginning with a letter or *"),
]
ToolRule = Annotated[
    str,
    *name_of(
        r"[A-Za-z][A-Za-z0-9_-]{0,255}\*?(\([^\x00-\x1f\x7f]*\))?",
        "a permission rule: Tool, Tool(specifier) or mcp__server__tool",
    ),
    StringConstraints(min_length=1, max_length=512),
    AfterValidator(_rule),
]
ToolRules = Annotated[list[ToolRule], Field(max_length=256), AfterValidator(_rules)]
SkillName = Annotated[
    str,
    *name_of(
        r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?", "1 to 64 of a-z, 0-9 and -, beginning and ending with a letter or digit"
    ),
]
ModelName = Annotated[str, *_MODEL, AfterValidator(_model)]
SubagentModelName = Annotated[
    str, *_MODEL, AfterValidator(lambda value: value if value == "inherit" else _model(value))
]
McpServerName = Annotated[
    str,
    *name_of(
        r"(?!.*__)[A-Za-z0-9]([A-Za-z0-9_-]{0,62}[A-Za-z0-9])?",
        "1 to 64 letters, digits, _ and -, beginning and ending with a letter or digit, without two _ in a row: the "
        "Claude CLI names the server's tools mcp__SERVER__TOOL",
    ),
    AfterValidator(_mcp_server),
]

SYSTEM_PROMPT_LIMIT = 200_000
"""Maximum length of a system prompt, in characters."""


OUTPUT_SCHEMA_LIMIT = 64 * 1024
"""Maximum size of an output schema, in bytes of JSON with ASCII escapes: the Claude CLI accepts it as one argument."""

Effort = Literal["low", "medium", "high", "xhigh", "max"]
PromptText = Annotated[str, StringConstraints(max_length=SYSTEM_PROMPT_LIMIT)]


def _object_schema(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("type") != "object":
        raise ValueError('must describe an object: {"type": "object", "properties": {...}}')
    try:
        size = len(json.dumps(value))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if size > OUTPUT_SCHEMA_LIMIT:
        raise ValueError(f"is {size} bytes of JSON with ASCII escapes; the limit is {OUTPUT_SCHEMA_LIMIT}")
    check_schema(value)
    return value


OutputSchema = Annotated[dict[str, Any], AfterValidator(_object_schema)]


class PresetPrompt(BaseModel):
    """Claude Code's system prompt, with optional text after it."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["preset"] = "preset"
    preset: Literal["claude_code"] = "claude_code"
    append: PromptText | None = None


class Thinking(BaseModel):
    """Extended thinking. `budget_tokens` is required with `enabled` and not allowed otherwise."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["adaptive", "enabled", "disabled"]
    budget_tokens: int | None = Field(default=None, ge=1024, le=1_000_000)

    @model_validator(mode="after")
    def _together(self) -> "Thinking":
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise ValueError("budget_tokens is required with type `enabled` and not allowed with any other type")
        return self


class Subagent(BaseModel):
    """A subagent that the session's agent can delegate work to. Its tools are a subset of the session's."""

    model_config = ConfigDict(extra="forbid")

    description: Annotated[str, StringConstraints(min_length=1, max_length=4000)] = Field(
        description="when to use it, for the model"
    )
    prompt: Annotated[str, StringConstraints(min_length=1, max_length=SYSTEM_PROMPT_LIMIT)]
    tools: list[ToolName] | None = Field(default=None, max_length=64, description="default: the tools of the session")
    disallowed_tools: list[ToolName] | None = Field(default=None, max_length=64)
    model: SubagentModelName | None = Field(default=None, description="default and `inherit`: the model of the session")
    max_turns: int | None = Field(default=None, ge=1, le=1000)
    effort: Effort | None = None


SubagentName = Annotated[str, *name_of(r"[a-z][a-z0-9-]{0,63}", "1 to 64 of a-z, 0-9 and -, beginning with a letter")]


class StdioMcpServer(BaseModel):
    """An MCP server that is installed in the sandbox's image and uses its standard input and output."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["stdio"] = "stdio"
    command: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    args: list[str] = Field(default_factory=list, max_length=64)


def _servers_fit(value: dict[str, StdioMcpServer]) -> dict[str, StdioMcpServer]:
    servers = {name: {"type": "stdio", "command": each.command, "args": each.args} for name, each in value.items()}
    check_json_size({"mcpServers": servers}, "the configuration of all servers")
    return value


McpServers = Annotated[dict[McpServerName, StdioMcpServer], Field(max_length=16), AfterValidator(_servers_fit)]


def no_remote_or_secret_mcp(value: Any) -> Any:
    """Refuse MCP servers that a sandbox cannot reach or whose configuration contains secrets.

    Raises ValueError, which pydantic turns into a 400 that names the field.
    """
    if not isinstance(value, dict):
        return value
    for name, server in value.items():
        if not isinstance(server, dict):
            continue
        if server.get("type", "stdio") != "stdio" or "url" in server:
            raise ValueError(
                f"server {name!r} is remote: a sandbox can reach only the gateway, so only stdio servers that "
                "are installed in the agent's image can be used"
            )
        for carrier in ("env", "headers"):
            if server.get(carrier):
                raise ValueError(
                    f"server {name!r} has {carrier!r}: its values are usually secrets, which must not enter a "
                    "sandbox; remove it"
                )
    return value


class SessionOptions(BaseModel):
    """Options of a session. For an option that is null, the default of the agent or of the pool applies.

    The first turn of a session sets its options; the manager refuses different values in later turns with 409.
    """

    model_config = ConfigDict(extra="forbid")

    model: ModelName | None = Field(default=None, description="Claude model; default `CLAUDE_MODEL`")
    fallback_model: ModelName | None = Field(default=None, description="used while `model` is overloaded")
    system_prompt: PromptText | PresetPrompt | None = None
    tools: list[ToolName] | None = Field(
        default=None,
        max_length=64,
        description="names of the Agent SDK's tools to offer; [] for none",
    )
    allowed_tools: ToolRules | None = Field(
        default=None,
        description="permission rules, as in the SDK: matching tool calls run without a permission request",
    )
    disallowed_tools: ToolRules | None = None
    permission_mode: PermissionMode | None = None
    approval_tools: list[ToolPattern] | None = Field(
        default=None,
        max_length=64,
        description="names of tools whose calls wait for the user's decision; `*` matches any characters",
    )
    mcp_servers: McpServers | None = None
    agents: dict[SubagentName, Subagent] | None = Field(
        default=None, max_length=16, description="subagents by name; the tool `Agent` is offered in addition"
    )
    skills: list[SkillName] | None = Field(
        default=None,
        max_length=32,
        description="names of skills in the agent's image; the tool `Skill` is offered in addition",
    )
    effort: Effort | None = Field(default=None, description="how much effort the model spends on an answer")
    thinking: Thinking | None = None
    output_schema: OutputSchema | None = Field(
        default=None, description="JSON schema (draft-07) of an object; each turn returns a matching object in `output`"
    )
    max_turns: int | None = Field(default=None, ge=1, le=1000, description="model calls per turn")
    max_budget_usd: float | None = Field(
        default=None, gt=0, le=1_000_000, allow_inf_nan=False, description="maximum total cost of the session, in USD"
    )

    @field_validator("mcp_servers", mode="before")
    @classmethod
    def _mcp_servers(cls, value: Any) -> Any:
        return no_remote_or_secret_mcp(value)

    @field_validator("*")
    @classmethod
    def _storable_values(cls, value: Any) -> Any:
        return storable(value)

    @classmethod
    def stored(cls, value: Any) -> Self:
        """Parse stored options. Raises Conflict for options that only an older version accepted."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            fault = error.errors(include_input=False, include_url=False)[0]
            field = ".".join(map(str, fault["loc"]))
            raise Conflict(
                f"the stored options are not valid in this version: {field}: {fault['msg']}; start a new session",
                details={"field": field},
            ) from None

    def with_defaults(self, defaults: "SessionOptions") -> "SessionOptions":
        """Return these options, with the values of `defaults` for those that are None."""
        return defaults.model_copy(update=self.given())

    def given(self) -> dict[str, Any]:
        """Return the options that are not None, as Python values by field name."""
        return {name: getattr(self, name) for name in SessionOptions.model_fields if getattr(self, name) is not None}
