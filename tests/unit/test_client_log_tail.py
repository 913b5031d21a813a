"""New lines of an agent's log over repeated reads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypercore_agents.client import log_tail as module
from hypercore_agents.client.log_tail import LogTail, beyond


@pytest.mark.parametrize(
    ("before", "now", "new"),
    [
        (b"", b"a\n", b"a\n"),
        (b"a\n", b"a\nb\n", b"b\n"),
        (b"a\n", b"a\na\n", b"a\n"),
        (b"x" * 5000, b"y" * 10, None),
        (b"a\n", b"a\n", b""),
        (b"a\n", b"", b""),
        (b"x" * 9000 + b"2\n2\n", b"x" * 5000 + b"2\n2\n3\n", b"3\n"),
        (b"a" + b"x" * 6000 + b"\n", b"x" * 5000 + b"\n" + b"x" * 6000 + b"\n", b"x" * 6000 + b"\n"),
    ],
)
def test_beyond_returns_the_new_part_of_a_log(before: bytes, now: bytes, new: bytes | None) -> None:
    assert beyond(before, now) == new


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 5))
def test_reads_of_a_growing_log_return_every_line_once(pieces: list[bytes], tail: int) -> None:
    seen, lines_read, log = LogTail(tail), list[str](), b""
    for piece in pieces:
        log += piece
        lines_read += seen.feed(log)
    lines_read += seen.rest()
    lines = [line.rstrip(b"\r").decode(errors="replace") for line in log.split(b"\n")]
    if not log.split(b"\n")[-1]:
        lines.pop()
    skipped = max(0, (pieces[0].count(b"\n") if pieces else 0) - tail)
    assert lines_read == lines[skipped:]


@given(st.integers(8192, 20000), st.lists(st.integers(0, 400), max_size=8))
def test_reads_of_the_end_of_a_long_log_return_every_line_once(window: int, counts: list[int]) -> None:
    seen, lines_read, log, number = LogTail(1), list[str](), b"", 0
    for count in [1, *counts]:
        for _ in range(count):
            log += b"line %d\n" % number
            number += 1
        lines_read += seen.feed(log[-window:])
    assert lines_read == [f"line {each}" for each in range(number)]


def test_an_empty_tail_starts_with_new_lines() -> None:
    seen = LogTail(0)
    assert seen.feed(b"one\ntwo\n") == []
    assert seen.feed(b"one\ntwo\nthree\n") == ["three"]


def test_partial_lines_are_not_joined_with_parts_of_other_lines() -> None:
    seen = LogTail(1)
    assert seen.feed(b"x" * 5000 + b"\none\ntw") == ["one"]
    assert seen.feed(b"dle of a line\nlater\nbeg") == ["tw", "later"]
    assert seen.feed(b"") == []
    assert seen.rest() == ["beg"]


@given(
    st.lists(st.sampled_from([b"a", b"ab", b"b"]), max_size=60), st.lists(st.sampled_from([b"a", b"ab"]), max_size=60)
)
def test_the_overlap_is_the_longest_possible(before: list[bytes], now: list[bytes]) -> None:
    earlier, later = b"".join(before), b"".join(now)
    longest = max(size for size in range(len(later) + 1) if earlier.endswith(later[:size]))
    assert module._overlap(earlier, later) == longest


def test_repetitive_logs_are_matched_beyond_the_search_limit() -> None:
    same = b"x\n" * 20_000
    assert beyond(b"gone\n" + same + b"other\n" + same, same + b"other\n" + same + b"x\n" * 100) == b"x\n" * 100
    assert beyond(b"gone\n" + same, b"y\n" + same) is None
