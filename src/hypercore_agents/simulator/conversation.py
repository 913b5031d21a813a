"""Extract prompts, tool results and offered tools from a request.

A *prompt* is text that a user wrote: a text block of a user message without the reminders and interruption notes that
the CLI adds. Each block is a prompt of its own: after a failed turn, the CLI sends its prompt and the next one as two
blocks of one message, and the directives of the failed one must not apply again. Directives are read from the newest
prompt only; the calls and results after it show which step of its script comes next. Everything is derived from the
conversation alone, so any worker can answer any request.
"""

import re
from dataclasses import dataclass
from typing import Any

from hypercore_agents.simulator.request import CountRequest

_REMINDER = re.compile(r"<system-reminder>.*?</system-reminder>", re.DOTALL)
_INTERRUPTED = re.compile(r"\[Request interrupted by user[^\]]*\]")
_SESSION = re.compile(r"<session>(.*?)</session>.*", re.DOTALL)
_BILLING_HEADER = "x-anthropic-billing-header"


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The result of a tool call, as text."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation up to the requested message.

    `results` are the tool results since the newest prompt. `offered` maps the callable tools to the JSON schemas of
    their input. `schema` is the schema of a structured answer. `forced` names a tool that must be called ("" for any).
    """

    system: str
    prompts: tuple[str, ...]
    results: tuple[ToolResult, ...]
    offered: dict[str, dict[str, Any]]
    schema: dict[str, Any] | None
    forced: str | None

    @property
    def prompt(self) -> str:
        """The newest prompt, or an empty string."""
        return self.prompts[-1] if self.prompts else ""


def read_conversation(request: CountRequest) -> Conversation:
    """Return the conversation of a request."""
    prompts: list[str] = []
    results: list[ToolResult] = []
    names: dict[str, str] = {}
    for message in request.messages:
        if message.role == "assistant":
            names.update({block.get("id"): block.get("name") for block in message.content if block.type == "tool_use"})
        elif message.role == "user":
            for block in message.content:
                if block.type == "tool_result":
                    results.append(ToolResult(names[block.get("tool_use_id")], _text(block.get("content"))))
                elif block.type == "text" and (prompt := _without_cli_notes(str(block.get("text")))):
                    prompts.append(prompt)
                    results = []
    schema = _schema(request)
    if schema is not None and prompts and (quoted := _SESSION.search(prompts[-1])):
        # The CLI's request for a title quotes the user's prompt; the directives in it do not apply to the title.
        prompts[-1] = quoted.group(1).replace("[[", "").replace("]]", "").strip()
    choice = request.tool_choice or {}
    offered = {
        tool["name"]: tool.get("input_schema", {})
        for tool in request.tools
        if choice.get("type") != "none" and _runs_on_client(tool)
    }
    forced = {"any": "", "tool": str(choice.get("name", ""))}.get(str(choice.get("type")))
    system = "\n".join(
        text for block in request.system if not (text := str(block.get("text") or "")).startswith(_BILLING_HEADER)
    )
    return Conversation(system, tuple(prompts), tuple(results), offered, schema, forced)


def _without_cli_notes(text: str) -> str:
    if "<system-reminder>" in text:
        text = _REMINDER.sub("", text)
    if text.startswith("[Request interrupted"):
        text = _INTERRUPTED.sub("", text)
    return text.strip()


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = []
    for block in content or []:
        if isinstance(block, dict):
            parts.append(str(block["text"]) if isinstance(block.get("text"), str) else f"[{block.get('type')}]")
    return "\n".join(parts)


def _schema(request: CountRequest) -> dict[str, Any] | None:
    output = (request.output_config or {}).get("format") or request.output_format
    if isinstance(output, dict) and output.get("type") == "json_schema" and isinstance(output.get("schema"), dict):
        schema: dict[str, Any] = output["schema"]
        return schema
    return None


def _runs_on_client(tool: dict[str, Any]) -> bool:
    """Return whether the client runs a tool: tools of all other types run on the API's servers."""
    kind = str(tool.get("type") or "custom")
    return isinstance(tool.get("name"), str) and kind.startswith(
        ("custom", "bash_", "text_editor_", "computer_", "memory_")
    )
