"""The SDK's transport to a CLI, which replaces invalid Unicode in the CLI's messages.

The CLI counts in UTF-16 and cuts long texts anywhere, and an MCP server may send any bytes, so the CLI's JSON may have
lone surrogates. No store accepts them, and no response can carry them. Everything that the agent server receives from a
CLI (messages, hook calls, transcript entries) passes through here once, after parsing and before use.
"""

from collections.abc import AsyncIterator
from typing import Any

from claude_agent_sdk import ClaudeAgentOptions
from claude_agent_sdk._internal.transport.subprocess_cli import SubprocessCLITransport

from hypercore_agents.api.text import replace_lone_surrogates


async def _no_prompts() -> AsyncIterator[dict[str, Any]]:
    return
    yield {}


class CleanTransport(SubprocessCLITransport):
    """One CLI, started like the SDK starts it."""

    def __init__(self, options: ClaudeAgentOptions) -> None:
        if options.can_use_tool is not None:
            options.permission_prompt_tool_name = "stdio"  # the SDK does this for its own transports
        super().__init__(prompt=_no_prompts(), options=options)

    async def read_messages(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the CLI's messages."""
        async for message in super().read_messages():
            yield replace_lone_surrogates(message)
