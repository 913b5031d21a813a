"""Metering does not depend on how a stream is split into chunks, wherever the stream is cut."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hypercore_agents.gateway.metering import CHARACTERS_PER_TOKEN, JsonMeter, StreamMeter, Tokens, estimated_tokens

Frames = list[tuple[str, dict[str, Any]]]
_counts = st.integers(0, 100_000)
_kinds = st.sampled_from([("text_delta", "text"), ("input_json_delta", "partial_json"), ("thinking_delta", "thinking")])
_deltas = st.lists(st.tuples(_kinds, st.text(max_size=30)), max_size=12)


@st.composite
def streams(draw: st.DrawFn) -> tuple[Frames, list[str], Tokens]:
    given, output, read, written = draw(_counts), draw(_counts), draw(_counts), draw(_counts)
    texts = []
    frames: Frames = [
        (
            "message_start",
            {
                "type": "message_start",
                "message": {
                    "usage": {
                        "input_tokens": given,
                        "output_tokens": 1,
                        "cache_read_input_tokens": read,
                        "cache_creation_input_tokens": written,
                    }
                },
            },
        ),
        ("ping", {"type": "ping"}),
        (
            "content_block_start",
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        ),
    ]
    for (kind, field), text in draw(_deltas):
        texts.append(text)
        frames.append(
            ("content_block_delta", {"type": "content_block_delta", "index": 0, "delta": {"type": kind, field: text}})
        )
    frames.append(("message_delta", {"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": output}}))
    frames.append(("message_stop", {"type": "message_stop"}))
    return frames, texts, Tokens(given, output, read, written)


def encode(frames: Frames, line_end: str = "\n", space: bool = True) -> bytes:
    gap = " " if space else ""
    separators = (", ", ": ") if space else (",", ":")
    return "".join(
        f"event:{gap}{name}{line_end}data:{gap}{json.dumps(data, separators=separators)}{line_end}{line_end}"
        for name, data in frames
    ).encode()


def chunks_of(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


_cuts = st.lists(st.integers(0, 100_000), max_size=40)


@given(streams(), _cuts, st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_any_chunking_gives_the_apis_numbers(
    stream: tuple[Frames, list[str], Tokens], cuts: list[int], line_end: str, space: bool
) -> None:
    frames, _, expected = stream
    meter = StreamMeter()
    ends = [meter.feed(chunk) for chunk in chunks_of(encode(frames, line_end, space), cuts)]
    assert ends.count(True) == 1
    assert (meter.started, meter.complete, meter.failed) == (True, True, False)
    assert meter.tokens() == expected


@given(streams(), _cuts, st.integers(0, 100_000))
def test_chunking_does_not_change_the_charge_of_a_cut_stream(
    stream: tuple[Frames, list[str], Tokens], cuts: list[int], cut_at: int
) -> None:
    data = encode(stream[0])
    data = data[: cut_at % len(data)]
    whole, pieces = StreamMeter(), StreamMeter()
    whole.feed(data)
    for chunk in chunks_of(data, cuts):
        pieces.feed(chunk)
    assert whole.tokens() == pieces.tokens()
    assert whole.complete == pieces.complete


@given(streams())
def test_a_cut_stream_is_charged_by_its_deltas(stream: tuple[Frames, list[str], Tokens]) -> None:
    frames, texts, expected = stream
    meter = StreamMeter()
    meter.feed(encode(frames[:-2]))
    produced = sum(len(json.dumps(text)) - 2 for text in texts)
    assert meter.tokens().input == expected.input
    assert meter.tokens().output == max(1, -(-produced // CHARACTERS_PER_TOKEN))


@given(st.binary(max_size=300), _cuts)
def test_arbitrary_bytes_do_not_fail(data: bytes, cuts: list[int]) -> None:
    whole, pieces = StreamMeter(), StreamMeter()
    whole.feed(data)
    for chunk in chunks_of(data, cuts):
        pieces.feed(chunk)
    assert whole.tokens() == pieces.tokens()


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.dictionaries(
            st.sampled_from(["usage", "input_tokens", "output_tokens", "message", "cache_creation"]), inner
        ),
    )
)
def test_usage_of_any_shape_does_not_fail(value: Any) -> None:
    meter = StreamMeter()
    meter.feed(encode([("message_start", {"message": value}), ("message_delta", {"usage": value})]))
    assert meter.tokens().output >= 0


def test_a_line_over_the_limit_counts_as_output() -> None:
    data = b"event: content_block_delta\ndata: " + b"x" * (1024 * 1024 + 10) + b"\n\n"
    whole, pieces = StreamMeter(), StreamMeter()
    whole.feed(data)
    for start in range(0, len(data), 60_000):
        pieces.feed(data[start : start + 60_000])
    assert whole.tokens() == pieces.tokens()
    assert whole.tokens().output == -(-(1024 * 1024 + 16) // CHARACTERS_PER_TOKEN)


def test_a_cut_json_answer_is_estimated() -> None:
    body = json.dumps({"type": "message", "usage": {"input_tokens": 7, "output_tokens": 9}}).encode()
    meter = JsonMeter()
    meter.feed(body[:10])
    meter.feed(body[10:])
    assert (meter.tokens(), meter.complete) == (Tokens(input=7, output=9), True)
    cut = JsonMeter()
    cut.feed(body[:20])
    assert (cut.tokens(), cut.complete) == (Tokens(output=5), False)


def test_non_english_texts_are_estimated_by_their_bytes() -> None:
    assert estimated_tokens(b"x" * 4000) == 1000
    assert estimated_tokens(("\u4f60\u597d" * 500).encode()) == 1500
    assert estimated_tokens("\U0001f600".encode() * 1000) == 2000


def _use(index: int, name: str) -> tuple[str, dict[str, Any]]:
    block = {"type": "server_tool_use", "id": f"srvtoolu_{index}", "name": name, "input": {}}
    return "content_block_start", {"type": "content_block_start", "index": index, "content_block": block}


def test_api_tool_uses_in_a_cut_stream_are_counted() -> None:
    start = ("message_start", {"type": "message_start", "message": {"usage": {"input_tokens": 7, "output_tokens": 1}}})
    said = {"type": "text_delta", "text": json.dumps({"type": "server_tool_use", "name": "web_search"})}
    text = ("content_block_delta", {"type": "content_block_delta", "index": 9, "delta": said})
    frames = [start, _use(0, "web_search"), _use(1, "web_search"), _use(2, "web_fetch"), text]
    for space in (False, True):
        cut = StreamMeter()
        cut.feed(encode(frames, space=space))
        for _ in range(2):
            assert cut.tokens().server_tools == {"web_search_requests": 2, "web_fetch_requests": 1}
    usage = {"output_tokens": 5, "server_tool_use": {"web_search_requests": 1}}
    whole = StreamMeter()
    whole.feed(encode([*frames, ("message_delta", {"type": "message_delta", "delta": {}, "usage": usage})]))
    assert whole.tokens().server_tools == {"web_search_requests": 1}, "the API's own number counts"


def test_api_tool_uses_in_a_cut_answer_are_counted() -> None:
    content = [_use(index, "web_search")[1]["content_block"] for index in range(3)]
    said = {"type": "text", "text": json.dumps(content)}
    meter = JsonMeter()
    meter.feed(json.dumps({"type": "message", "content": [said, *content]}).encode()[:-1])
    for _ in range(2):
        assert meter.tokens().server_tools == {"web_search_requests": 3}
