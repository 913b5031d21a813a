"""Translates the platform's session options into the Agent SDK's options.

Everything that two sessions could share is off: setting sources, other MCP configuration, and all skills except the
requested skills of the operator (`skills.py`). The system prompt goes into a file, because a command line is visible
to the whole machine and one of its arguments holds at most 128 KiB.

Permissions, as the pinned CLI implements them: `dontAsk` denies every call that no rule allows, and a bare `Write` rule
allows writing anywhere. So the default mode has one rule per offered tool, and allows file edits only below the
workspace (`Edit(./**)`, which covers Write and NotebookEdit). Reads below the workspace need no rule. Rules do not
confine shell commands; the sandbox does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import claude_agent_sdk
from claude_agent_sdk import ClaudeAgentOptions, HookMatcher
from claude_agent_sdk.types import (
    AgentDefinition,
    McpStdioServerConfig,
    SessionStore,
    SystemPromptFile,
    SystemPromptPreset,
    ThinkingConfig,
)

from hypercore_agents.agent.claude.skills import SKILL_TOOL, names_of, plugins_of, reading_rules
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.agent.persistence.transcript import TranscriptPort
from hypercore_agents.api.errors import InvalidRequest
from hypercore_agents.api.internal import AgentConfiguration
from hypercore_agents.api.options import PermissionMode, PresetPrompt, SessionOptions

DEFAULT_TOOLS = ("Bash", "Edit", "Glob", "Grep", "NotebookEdit", "Read", "Write")
DEFAULT_PERMISSION_MODE: PermissionMode = "dontAsk"
LONGEST_LINE = 16 * 1024 * 1024
"""Maximum length of a CLI message, in characters. A tool result with an image fits; an endless line does not."""

SYSTEM_PROMPT_FILE = "system-prompt"
"""Name of the file in the session's folder from which the CLI reads the system prompt."""
SUBAGENT_TOOL = "Agent"

_EDITING = frozenset({"Edit", "NotebookEdit", "Write"})
_READING = frozenset({"Glob", "Grep", "Read"})


@dataclass(frozen=True)
class Offer:
    """The tools that a session may use, with their rules, and notices for its user."""

    tools: tuple[str, ...]
    allowed: tuple[str, ...]
    mcp: bool
    notices: tuple[str, ...] = field(default=())
    skills: tuple[str, ...] = field(default=())

    @property
    def any(self) -> bool:
        """Whether any tools are offered."""
        return bool(self.tools) or self.mcp


def bundled_cli() -> Path:
    """Return the path of the Claude CLI in the Agent SDK's wheel."""
    return Path(claude_agent_sdk.__file__).parent / "_bundled" / "claude"


def check(options: SessionOptions, *, as_root: bool) -> None:
    """Reject options that the CLI would reject or misread. Raises InvalidRequest with the field and the remedy."""
    if options.permission_mode == "bypassPermissions" and as_root:
        raise InvalidRequest(
            "permission_mode: the Claude CLI rejects bypassPermissions for root, and this agent's sessions run as "
            "root; use dontAsk with allowed_tools, or acceptEdits",
            field="permission_mode",
        )


def why_no_tools(configuration: AgentConfiguration, *, separate: bool) -> str | None:
    """Return why this agent offers no tools, None when it does. `separate`: its sessions are isolated."""
    if not configuration.tools:
        return configuration.tools_reason or "the operator disabled tools"
    if configuration.needs_separation and not separate:
        return "this agent was started without its launcher, so its sessions are not isolated from each other"
    return None


def offer(options: SessionOptions, configuration: AgentConfiguration, *, separate: bool = False) -> Offer:
    """Decide which tools a session is offered, and by which rules."""
    requested = options.tools is None or bool(options.tools) or bool(options.mcp_servers) or bool(options.agents)
    requested = requested or bool(options.skills)
    reason = why_no_tools(configuration, separate=separate)
    if reason is not None:
        notices = [f"tools are off on this agent: {reason}"] if requested else []
        explicit = [*(options.tools or ()), *(f"MCP server {name}" for name in options.mcp_servers or ()),
                    *(f"subagent {name}" for name in options.agents or ()),
                    *(f"skill {name}" for name in options.skills or ())]  # fmt: skip
        if explicit:
            notices.append(f"requested but not available: {', '.join(explicit)}")
        return Offer((), (), False, tuple(notices))
    tools = DEFAULT_TOOLS if options.tools is None else tuple(dict.fromkeys(options.tools))
    if options.agents and SUBAGENT_TOOL not in tools:
        tools = (*tools, SUBAGENT_TOOL)
    if options.skills and SKILL_TOOL not in tools:
        tools = (*tools, SKILL_TOOL)
    mode = options.permission_mode or DEFAULT_PERMISSION_MODE
    if options.allowed_tools is not None:
        allowed = tuple(options.allowed_tools)
    elif mode == "dontAsk":
        allowed = _rules(tools, tuple(options.mcp_servers or ()))
    else:
        allowed = ()
    return Offer(tools, allowed, bool(options.mcp_servers), skills=tuple(dict.fromkeys(options.skills or ())))


def sdk_options(
    options: SessionOptions,
    offered: Offer,
    folder: SessionFolder,
    *,
    cli: Path,
    environment: Mapping[str, str],
    resume: bool,
    skills: Path,
    approvals: list[HookMatcher] | None = None,
    transcript: TranscriptPort | None = None,
) -> ClaudeAgentOptions:
    """Return the SDK's options for one process of a session. The isolation writes the system prompt's file."""
    return ClaudeAgentOptions(
        cli_path=cli,
        cwd=folder.workspace,
        env=dict(environment),
        session_id=None if resume else folder.session_id,
        resume=folder.session_id if resume else None,
        model=options.model,
        fallback_model=options.fallback_model,
        system_prompt=_system_prompt(options.system_prompt, folder),
        extra_args=_extra_arguments(options.system_prompt, folder),
        agents=_subagents(options, offered),
        effort=options.effort,
        thinking=cast(ThinkingConfig, options.thinking.model_dump(exclude_none=True)) if options.thinking else None,
        output_format={"type": "json_schema", "schema": options.output_schema} if options.output_schema else None,
        tools=list(offered.tools),
        allowed_tools=[*offered.allowed, *reading_rules(offered.skills, skills)],
        disallowed_tools=list(options.disallowed_tools or ()),
        permission_mode=options.permission_mode or DEFAULT_PERMISSION_MODE,
        mcp_servers={
            name: McpStdioServerConfig(type="stdio", command=server.command, args=server.args)
            for name, server in (options.mcp_servers or {}).items()
        }
        if offered.mcp
        else {},
        hooks={"PreToolUse": approvals} if approvals else None,
        session_store=cast(SessionStore | None, transcript),
        session_store_flush="eager",
        max_turns=options.max_turns,
        setting_sources=[],
        strict_mcp_config=True,
        skills=names_of(offered.skills),
        plugins=plugins_of(offered.skills, skills),
        verbatim_prompts=True,
        include_partial_messages=True,
        max_buffer_size=LONGEST_LINE,
    )


def prompt_text(prompt: str | PresetPrompt | None) -> str | None:
    """Return the part of a system prompt that goes into a file: all of it, or the text that follows the preset."""
    return prompt.append if isinstance(prompt, PresetPrompt) else prompt


def _system_prompt(
    prompt: str | PresetPrompt | None, folder: SessionFolder
) -> str | SystemPromptFile | SystemPromptPreset:
    if isinstance(prompt, PresetPrompt):
        return SystemPromptPreset(type="preset", preset=prompt.preset)
    if not prompt:
        return ""
    return SystemPromptFile(type="file", path=str(folder.system_prompt))


def _extra_arguments(prompt: str | PresetPrompt | None, folder: SessionFolder) -> dict[str, str | None]:
    appended = isinstance(prompt, PresetPrompt) and prompt.append
    return {"append-system-prompt-file": str(folder.system_prompt)} if appended else {}


def _subagents(options: SessionOptions, offered: Offer) -> dict[str, AgentDefinition] | None:
    if SUBAGENT_TOOL not in offered.tools or not options.agents:
        return None
    return {
        name: AgentDefinition(
            description=agent.description,
            prompt=agent.prompt,
            tools=None if agent.tools is None else [tool for tool in agent.tools if tool in offered.tools],
            disallowedTools=agent.disallowed_tools,
            model=agent.model,
            maxTurns=agent.max_turns,
            effort=agent.effort,
        )
        for name, agent in options.agents.items()
    }


def _rules(tools: Sequence[str], mcp_servers: Sequence[str]) -> tuple[str, ...]:
    rules = [name for name in tools if name not in _EDITING and name not in _READING]
    if _EDITING.intersection(tools):
        rules.append("Edit(./**)")
    return (*rules, *(f"mcp__{name}" for name in mcp_servers))
