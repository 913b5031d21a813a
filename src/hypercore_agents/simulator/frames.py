"""The wire form of an answer: a JSON message, or server-sent events in the API's order.

message_start, then for each block content_block_start, its deltas and content_block_stop, then message_delta with the
usage, then message_stop; one ping follows the first content_block_start. Events are encoded only when they are due: a
waiting stream holds its text and an index, and an event costs one escape and one join of bytes.
Reference: https://docs.claude.com/en/docs/build-with-claude/streaming.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any

from hypercore_agents.simulator.answers import TOKEN_CHARACTERS, Answer, Text, ToolUse, tokens_of, tool_input

BURST_TOKENS = 4
"""Tokens in a delta of a stream without pacing."""
SHORTEST_INTERVAL = 0.02
"""Seconds between deltas; higher rates put more tokens into a delta instead."""

_TEXT_DELTA = '"delta":{"type":"text_delta","text":'
_INPUT_DELTA = '"delta":{"type":"input_json_delta","partial_json":'
_PING = b'event: ping\ndata: {"type":"ping"}\n\n'


@dataclass(frozen=True, slots=True)
class Delta:
    """Bytes that are due at the same time, and the number of tokens in them."""

    data: bytes
    tokens: int


def tokens_per_delta(rate: float) -> int:
    """Return the number of tokens in a delta at this rate (tokens per second)."""
    return max(1, math.ceil(rate * SHORTEST_INTERVAL)) if rate > 0 else BURST_TOKENS


def usage(answer: Answer, output_tokens: int) -> dict[str, int]:
    """Return the usage object; tokens read from or written to the cache are not part of `input_tokens`."""
    return {
        "input_tokens": answer.input_tokens,
        "cache_creation_input_tokens": answer.cache.write,
        "cache_read_input_tokens": answer.cache.read,
        "output_tokens": output_tokens,
    }


def message(answer: Answer) -> bytes:
    """Return the JSON body of an unstreamed answer."""
    content: list[dict[str, Any]] = [
        {"type": "text", "text": block.text}
        if isinstance(block, Text)
        else {"type": "tool_use", "id": block.id, "name": block.name, "input": tool_input(block)}
        for block in answer.blocks
    ]
    return json.dumps(
        _envelope(answer)
        | {
            "content": content,
            "stop_reason": answer.stop_reason,
            "stop_sequence": answer.stop_sequence,
            "usage": usage(answer, answer.output_tokens),
        }
    ).encode()


def deltas(answer: Answer, most: int | None = None) -> Iterator[Delta]:
    """Yield the stream in pieces, each due one interval after the previous one.

    The first piece contains the start of the stream and the last its end. `most`, if given, is the number of tokens
    after which the stream breaks off, at the latest before its end.
    """
    step = tokens_per_delta(answer.rate) * TOKEN_CHARACTERS
    remaining = math.inf if most is None else most * TOKEN_CHARACTERS
    opening = _envelope(answer) | {"content": [], "stop_reason": None, "stop_sequence": None}
    pending = _event("message_start", message=opening | {"usage": usage(answer, min(1, answer.output_tokens))})
    tokens = 0
    for index, block in enumerate(answer.blocks):
        start, content = _opening(block, index)
        pending += start + _PING if index == 0 else start
        kind = _TEXT_DELTA if isinstance(block, Text) else _INPUT_DELTA
        prefix = f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{index},{kind}'
        for position in range(0, len(content), step):
            if tokens:
                yield Delta(pending, tokens)
                pending = b""
            if remaining <= 0:
                return
            piece = content[position : position + min(step, int(min(remaining, step)))]
            pending += f"{prefix}{encode_basestring_ascii(piece)}}}}}\n\n".encode("ascii")
            tokens = tokens_of(piece)
            remaining -= step
        pending += _event("content_block_stop", index=index)
    if most is None:
        ending = {"stop_reason": answer.stop_reason, "stop_sequence": answer.stop_sequence}
        pending += _event("message_delta", delta=ending, usage=usage(answer, answer.output_tokens))
        pending += _event("message_stop")
    yield Delta(pending, tokens)


def error_event(body: bytes) -> bytes:
    """Return the event that ends a stream with an error; `body` is the error's JSON."""
    return b"event: error\ndata: " + body + b"\n\n"


def _envelope(answer: Answer) -> dict[str, Any]:
    return {"id": answer.id, "type": "message", "role": "assistant", "model": answer.model}


def _opening(block: Text | ToolUse, index: int) -> tuple[bytes, str]:
    if isinstance(block, Text):
        return _event("content_block_start", index=index, content_block={"type": "text", "text": ""}), block.text
    empty = {"type": "tool_use", "id": block.id, "name": block.name, "input": {}}
    return _event("content_block_start", index=index, content_block=empty), block.input


def _event(name: str, **fields: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields}, separators=(',', ':'))}\n\n".encode()
