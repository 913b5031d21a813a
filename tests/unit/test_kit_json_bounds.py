"""The limit on JSON values: exact for valid texts in any chunks, and early for hostile texts."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypercore_agents.api.errors import InvalidRequest
from hypercore_agents.kit.limits import json_bounds
from hypercore_agents.kit.limits.json_bounds import JsonBounds

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='ab",\\[]{}:\n\u00e9'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='k"\\,[{'), inner),
    max_leaves=30,
)


def separators(value: Any) -> int:
    """Return the number of commas and opening brackets in the JSON of a value."""
    if isinstance(value, dict):
        return max(1, len(value)) + sum(map(separators, value.values()))
    if isinstance(value, list):
        return max(1, len(value)) + sum(map(separators, value))
    return 0


def counted(text: bytes, cuts: list[int], *, limit: int = 10**9) -> int:
    bounds = JsonBounds(limit)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for start, end in itertools.pairwise(places):
        bounds.feed(text[start:end])
    return bounds.upper_bound


@given(JSON, st.booleans(), st.lists(st.integers(min_value=0)), st.integers(min_value=1, max_value=9))
def test_the_count_is_exact(value: Any, ascii: bool, cuts: list[int], piece: int) -> None:
    text = json.dumps(value, ensure_ascii=ascii).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_bounds, "_CHEAP", -1)  # without the cheap bound
        patch.setattr(json_bounds, "_PIECE", piece)
        assert counted(text, cuts) == separators(value)
    assert counted(text, cuts) >= separators(value), "the cheap bound is one"


HOSTILE = {
    "many objects": b'{"messages":[' + b"{}," * 1_000_000 + b"{}]}",
    "many keys": b"{" + b",".join(b'"%d":0' % number for number in range(300_000)) + b"}",
    "the same key many times": b"{" + b'"a":0,' * 300_000 + b'"a":0}',
    "many empty lists": b"[" + b"[]," * 300_000 + b"[]]",
    "deep lists": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 1_000_000,
    "many numbers": b"[" + b"1," * 1_000_000 + b"1]",
    "brackets after an escaped quote": b'["\\"",' + b"{}," * 300_000 + b"{}]",
    "brackets after an escaped backslash": b'["\\\\",' + b"{}," * 300_000 + b"{}]",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_texts_with_too_many_values_are_refused_early(kind: str) -> None:
    text = HOSTILE[kind]
    with pytest.raises(InvalidRequest, match="200000 values") as refused:
        counted(text, list(range(0, len(text), 60_000)), limit=200_000)
    assert refused.value.details == {"limit_values": 200_000, "field": "body"}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"a": "{},[" * 5_000_000}).encode(),
        json.dumps(['say "hi", \\ {}\n'] * 100_000).encode(),
        b'["' + b"\\\\" * 1_000_000 + b'"]',
        b'["' + b'\\"' * 1_000_000 + b'"]',
    ],
    ids=["a text of brackets", "many quotes", "backslashes", "escaped quotes"],
)
def test_large_texts_with_few_values_are_accepted(text: bytes) -> None:
    counted(text, [7, 65_536, 1_000_001], limit=200_000)
