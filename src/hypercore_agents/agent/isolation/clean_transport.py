"""The SDK's transport to a CLI, with every text in what the CLI says made valid Unicode.

The CLI counts in UTF-16 and cuts long texts anywhere, and an MCP server may send what it likes, so that the CLI's JSON
has lone surrogates in it. No store takes them and no answer can be sent with them. All that the agent server learns
from a CLI (messages, hook calls, transcript entries) passes here once, parsed and not yet used.
"""

from collections.abc import AsyncIterator
from typing import Any

from claude_agent_sdk import ClaudeAgentOptions
from claude_agent_sdk._internal.transport.subprocess_cli import SubprocessCLITransport

from hypercore_agents.api.text import cleaned


async def _nothing() -> AsyncIterator[dict[str, Any]]:
    return
    yield {}


class CleanTransport(SubprocessCLITransport):
    """One CLI, started as the SDK does it."""

    def __init__(self, options: ClaudeAgentOptions) -> None:
        if options.can_use_tool is not None:
            options.permission_prompt_tool_name = "stdio"  # as the SDK does for a transport that it makes itself
        super().__init__(prompt=_nothing(), options=options)

    async def read_messages(self) -> AsyncIterator[dict[str, Any]]:
        """Give what the CLI says."""
        async for message in super().read_messages():
            yield cleaned(message)
