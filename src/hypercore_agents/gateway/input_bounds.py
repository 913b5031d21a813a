"""The maximum number of input tokens that a request can be charged for, computed from its body alone.

It is a bound, not an estimate, and it is free: while most of a budget is left, the API need not count tokens. The bound
of each part, with its reason:

- Text: a token is at least one byte, so the body's bytes limit its tokens. The body's own keys, quotes and braces are
  more than the API adds around messages and blocks.
- Tools: the API adds text around each, and a system prompt if there are any (at most about 800 tokens by its
  documentation). `_PER_TOOL` and `_OVERHEAD` are several times that.
- Images: their size in bytes does not limit their tokens (a few hundred bytes of PNG can decode to any area), but the
  API scales them down; the largest that it documents is below 5,000 tokens. `_PER_IMAGE` replaces the data's bytes.
- Documents (a PDF is compressed; citations split a text into many parts), blocks of unknown types and tools that the
  API runs itself: the largest context window, because the API rejects a larger request without charge.

A tool that the API runs itself (none, unless the operator lists it) reads more input during its request. Only the
context window limits that input at each step, and this bound does not include it; `server_tool_units` limits how often
such a tool may run.
"""

import re

from hypercore_agents.api.errors import InvalidRequest
from hypercore_agents.gateway.request_rules import ModelRequest

_DATE = re.compile(r"_\d{8}$")
_OVERHEAD = 4096
_PER_TOOL = 256
_PER_IMAGE = 8192
_WINDOW = 1_000_000
_TEXTUAL = frozenset(("text", "thinking", "redacted_thinking", "tool_use", "tool_result", "tool_reference"))


def max_input_tokens(request: ModelRequest) -> int:
    """Return the bound for a request in its present form."""
    tokens = _OVERHEAD + len(request.encoded())
    for block in request.blocks():
        kind = block.get("type")
        if kind == "image":
            source = block.get("source")
            data = source.get("data") if isinstance(source, dict) else None
            tokens += _PER_IMAGE - (len(data) if isinstance(data, str) else 0)
        elif not isinstance(kind, str) or kind not in _TEXTUAL:
            tokens += _WINDOW
    for tool in request.body.get("tools") or ():
        tokens += _PER_TOOL if tool.get("type") in (None, "custom") else _WINDOW
    return tokens


def server_tool_units(request: ModelRequest) -> dict[str, int]:
    """Return how many units of each API-run tool a request can be charged for, by the names of the units.

    Raises InvalidRequest for a tool without a limit on its uses.
    """
    units: dict[str, int] = {}
    for number, tool in enumerate(request.body.get("tools") or ()):
        kind = tool.get("type")
        if kind in (None, "custom"):
            continue
        uses = tool.get("max_uses")
        if not isinstance(uses, int) or isinstance(uses, bool) or not 1 <= uses <= 10_000:
            raise InvalidRequest(
                f"tools.{number}.max_uses must be between 1 and 10000 in a session with max_budget_usd: each use is "
                "billed",
                field=f"tools.{number}.max_uses",
            )
        name = _DATE.sub("", kind) + "_requests"
        units[name] = units.get(name, 0) + uses
    return units
