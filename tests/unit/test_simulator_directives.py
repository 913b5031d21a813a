import pytest

from hypercore_agents.simulator.directives import (
    Cache,
    CallTool,
    Directive,
    Fault,
    FirstToken,
    Rate,
    Recall,
    Say,
    Stop,
    Tokens,
    parse,
)
from hypercore_agents.simulator.failures import ApiFailure


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[say two words]]", Say("two words")),
        ("[[say over\ntwo lines]]", Say("over\ntwo lines")),
        ("[[tool Bash]]", CallTool("Bash", {})),
        ('[[tool mcp__x__y {"a": [[1], ["]]"]]}]]', CallTool("mcp__x__y", {"a": [[1], ["]]"]]})),
        ("[[recall 12]]", Recall("12")),
        ("[[recall system]]", Recall("system")),
        ("[[ttft 0.25]]", FirstToken(0.25)),
        ("[[rate 50]]", Rate(50)),
        ("[[tokens 100]]", Tokens(100)),
        ("[[stop refusal]]", Stop("refusal")),
        ("[[cache read=10]]", Cache(10, 0)),
        ("[[fault 529]]", Fault("529")),
        ("[[fault 429 times=2 retry_after=0.5]]", Fault("429", times=2, retry_after=0.5)),
        ("[[fault cut]]", Fault("cut", after=1)),
        ("[[fault hang after=7]]", Fault("hang", after=7)),
    ],
)
def test_each_directive_is_parsed_and_removed_from_the_text(text: str, expected: Directive) -> None:
    assert parse(text) == ((expected,), "")


def test_directives_keep_their_order_and_the_text_around_them() -> None:
    directives, plain = parse("before [[say a]] between [[rate 5]] after")
    assert directives == (Say("a"), Rate(5))
    assert plain == "before  between  after"


@pytest.mark.parametrize("text", ["if [[ -f x ]]; then", "[[Wiki link]]", "[[sayings]]", "a ]] b [[", "[[say", ""])
def test_other_double_brackets_are_plain_text(text: str) -> None:
    assert parse(text) == ((), text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[say never closed", "unterminated"),
        ("[[tool ]]", "the name of a tool is missing"),
        ("[[tool Bash {broken}]]", "the input of Bash is not JSON"),
        ("[[tool Bash [1]]]", "must be one JSON object"),
        ("[[tool Bash {} more]]", "must be one JSON object"),
        ("[[recall 0]]", "'0' is not the number of a prompt"),
        ("[[ttft soon]]", "'soon' is not a number from 0 to 3600"),
        ("[[ttft nan]]", "'nan' is not a number"),
        ("[[rate -1]]", "'-1' is not a number"),
        ("[[tokens 1.5]]", "'1.5' is not a whole number"),
        ("[[stop later]]", "'later' is not one of end_turn"),
        ("[[fault 418]]", "'418' is not one of 400, 401"),
        ("[[fault]]", "'' is not one of"),
        ("[[fault 529 time=1]]", "'time=1' is not one of times=..., after=..., retry_after=..."),
        ("[[fault 529 times=0]]", "'0' is not a whole number from 1"),
        ("[[fault 529 times=1 times=2]]", "'times=2' is not one of"),
        ("[[cache read]]", "'read' is not one of read=..., write=..."),
    ],
)
def test_malformed_directives_fail_with_the_expected_format(text: str, problem: str) -> None:
    with pytest.raises(ApiFailure) as caught:
        parse(text)
    assert caught.value.status == 400
    assert problem in caught.value.message
