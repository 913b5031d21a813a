"""What a session can be asked to be: the Agent SDK's options that the platform offers."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from hypercore_agents.api.text import keepable

PermissionMode = Literal["default", "acceptEdits", "plan", "dontAsk", "bypassPermissions"]
ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,127}$")]
ToolPattern = Annotated[str, StringConstraints(pattern=r"^[A-Za-z*][A-Za-z0-9_*-]{0,127}$")]
ToolRule = Annotated[str, StringConstraints(min_length=1, max_length=512)]
SkillName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$")]
ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,127}$")]

SYSTEM_PROMPT_LIMIT = 200_000
"""Longest system prompt, in characters."""


OUTPUT_SCHEMA_LIMIT = 64 * 1024
"""Longest output schema, in characters of JSON: the Claude CLI takes it as one argument of 128 KiB at most."""

Effort = Literal["low", "medium", "high", "xhigh", "max"]
PromptText = Annotated[str, StringConstraints(max_length=SYSTEM_PROMPT_LIMIT)]


def _object_schema(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("type") != "object":
        raise ValueError('must describe an object: {"type": "object", "properties": {...}}')
    if len(json.dumps(value)) > OUTPUT_SCHEMA_LIMIT:
        raise ValueError(f"is longer than {OUTPUT_SCHEMA_LIMIT} characters of JSON")
    return value


OutputSchema = Annotated[dict[str, Any], AfterValidator(_object_schema)]


class PresetPrompt(BaseModel):
    """Claude Code's own system prompt, with or without something after it."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["preset"] = "preset"
    preset: Literal["claude_code"] = "claude_code"
    append: PromptText | None = None


class Thinking(BaseModel):
    """Extended thinking. `budget_tokens` goes with `enabled`."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["adaptive", "enabled", "disabled"]
    budget_tokens: int | None = Field(default=None, ge=1024, le=1_000_000)

    @model_validator(mode="after")
    def _together(self) -> "Thinking":
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise ValueError("budget_tokens goes with type `enabled`, and only with it")
        return self


class Subagent(BaseModel):
    """An agent that the session's own may hand work to. Its tools are among the session's."""

    model_config = ConfigDict(extra="forbid")

    description: Annotated[str, StringConstraints(min_length=1, max_length=4000)] = Field(
        description="when to use it; the model reads this"
    )
    prompt: Annotated[str, StringConstraints(min_length=1, max_length=SYSTEM_PROMPT_LIMIT)]
    tools: list[ToolName] | None = Field(default=None, max_length=64, description="default: the session's")
    disallowed_tools: list[ToolName] | None = Field(default=None, max_length=64)
    model: ModelName | None = None
    max_turns: int | None = Field(default=None, ge=1, le=1000)
    effort: Effort | None = None


SubagentName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,63}$")]


class StdioMcpServer(BaseModel):
    """An MCP server that the sandbox's image holds, spoken to over its standard input and output."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["stdio"] = "stdio"
    command: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    args: list[str] = Field(default_factory=list, max_length=64)


def no_remote_or_secret_mcp(value: Any) -> Any:
    """Refuse, with the reason, MCP servers that a sandbox cannot reach or that carry a literal secret.

    Raises ValueError, which pydantic turns into a 400 that names the field.
    """
    if not isinstance(value, dict):
        return value
    for name, server in value.items():
        if not isinstance(server, dict):
            continue
        if server.get("type", "stdio") != "stdio" or "url" in server:
            raise ValueError(
                f"server {name!r} is remote: a sandbox reaches nothing but the gateway, so only stdio servers "
                "that the agent's image holds can run (remote ones come with the egress proxy)"
            )
        for carrier in ("env", "headers"):
            if server.get(carrier):
                raise ValueError(
                    f"server {name!r} has {carrier!r}: values there are usually secrets and none may enter a "
                    "sandbox; remove it"
                )
    return value


class SessionOptions(BaseModel):
    """Options of a session. `None` means "not said": the agent's, then the pool's default applies.

    They freeze at the session's first turn; the manager answers 409 to a different later value.
    """

    model_config = ConfigDict(extra="forbid")

    model: ModelName | None = Field(default=None, description="Claude model; default `CLAUDE_MODEL`")
    fallback_model: ModelName | None = Field(default=None, description="used while `model` is overloaded")
    system_prompt: PromptText | PresetPrompt | None = None
    tools: list[ToolName] | None = Field(
        default=None,
        max_length=64,
        description="names of the Agent SDK's tools that are offered; [] offers none",
    )
    allowed_tools: list[ToolRule] | None = Field(
        default=None, max_length=256, description="permission rules that need no question, as the SDK's"
    )
    disallowed_tools: list[ToolRule] | None = Field(default=None, max_length=256)
    permission_mode: PermissionMode | None = None
    approval_tools: list[ToolPattern] | None = Field(
        default=None,
        max_length=64,
        description="tools whose every call waits for the user's decision, by name; `*` stands for any letters",
    )
    mcp_servers: dict[str, StdioMcpServer] | None = Field(default=None, max_length=16)
    agents: dict[SubagentName, Subagent] | None = Field(
        default=None, max_length=16, description="subagents by name; the tool `Agent` is offered with them"
    )
    skills: list[SkillName] | None = Field(
        default=None,
        max_length=32,
        description="skills of the agent's image, by name; the tool `Skill` is offered with them",
    )
    effort: Effort | None = Field(default=None, description="how much work the model puts into an answer")
    thinking: Thinking | None = None
    output_schema: OutputSchema | None = Field(
        default=None, description="JSON schema of an object; each turn's answer has it, parsed, in `output`"
    )
    max_turns: int | None = Field(default=None, ge=1, le=1000, description="model calls per turn")
    max_budget_usd: float | None = Field(
        default=None, gt=0, le=1_000_000, description="what the session may cost in all, in USD"
    )

    @field_validator("mcp_servers", mode="before")
    @classmethod
    def _mcp_servers(cls, value: Any) -> Any:
        return no_remote_or_secret_mcp(value)

    @field_validator("*")
    @classmethod
    def _keepable(cls, value: Any) -> Any:
        return keepable(value)

    def over(self, defaults: "SessionOptions") -> "SessionOptions":
        """Return these options with what they leave unsaid taken from `defaults`."""
        return defaults.model_copy(update=self.said())

    def said(self) -> dict[str, Any]:
        """Return the options that are not None, as Python values by field name."""
        return {name: getattr(self, name) for name in SessionOptions.model_fields if getattr(self, name) is not None}
