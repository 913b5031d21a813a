import contextlib
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hypercore_agents.simulator.directives import CallTool, parse
from hypercore_agents.simulator.failures import ApiFailure

INPUTS = st.dictionaries(
    st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda s: st.lists(s, max_size=4))
)
FRAGMENTS = st.lists(
    st.sampled_from(["[[", "]]", "say", "tool", "fault", "529", " ", "{}", "{", "times=1", "rate", "x", "\n", '"'])
)


@given(INPUTS)
def test_any_tool_input_is_parsed_unchanged(value: dict[str, Any]) -> None:
    directives, plain = parse(f"a [[tool Write {json.dumps(value)}]] b")
    assert directives == (CallTool("Write", value),)
    assert plain == "a  b"


@given(FRAGMENTS)
def test_any_text_is_parsed_or_rejected_without_other_errors(fragments: list[str]) -> None:
    with contextlib.suppress(ApiFailure):
        parse("".join(fragments))


@given(st.text().filter(lambda text: "[[" not in text))
def test_text_without_brackets_is_unchanged(text: str) -> None:
    assert parse(text) == ((), text.strip())
