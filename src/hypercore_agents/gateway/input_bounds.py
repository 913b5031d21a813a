"""The most input tokens that a request can be charged for, from its body alone: a pure function.

It only has to hold, and it costs nothing: where the budget is far away nobody asks the API. Each part, and why:

- Text: a token is at least one byte, so the body's bytes bound its tokens. The body's own keys, quotes and braces are
  more than what the API puts around messages and blocks.
- Tools: each is wrapped in words of the API's, and their presence adds a system prompt (some 800 tokens at most by its
  documentation). `_PER_TOOL` and `_OVERHEAD` are several times that.
- Images: their size in bytes says nothing (a few hundred bytes of PNG unpack to any area), but the API scales them
  down; the largest that it documents is below 5,000 tokens. `_PER_IMAGE` stands in the place of the data's bytes.
- Documents (a PDF is compressed; citations cut a text in pieces with a mark each), blocks of a kind not known here and
  tools that the API runs itself: the largest context window there is, since a request beyond it is refused unpaid.

A tool that the API runs itself (none, unless the operator lists it) reads on inside of its request; what it finds is
bounded only by the context window at each of its steps, and not here. How often it may run is (`server_tool_units`).
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


def most_input_tokens(request: ModelRequest) -> int:
    """Return the bound for a request as it would be sent now."""
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
    """Return how many units of each tool that the API runs itself a request can be charged for, by the units' names.

    Raises InvalidRequest for a tool whose uses have no bound.
    """
    units: dict[str, int] = {}
    for number, tool in enumerate(request.body.get("tools") or ()):
        kind = tool.get("type")
        if kind in (None, "custom"):
            continue
        uses = tool.get("max_uses")
        if not isinstance(uses, int) or isinstance(uses, bool) or not 1 <= uses <= 10_000:
            raise InvalidRequest(
                f"tools.{number}.max_uses must be from 1 to 10000 in a session with max_budget_usd: each use is billed",
                field=f"tools.{number}.max_uses",
            )
        name = _DATE.sub("", kind) + "_requests"
        units[name] = units.get(name, 0) + uses
    return units
