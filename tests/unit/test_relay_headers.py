"""Headers that a relay forwards, and framings that it refuses."""

import pytest

from hypercore_agents.api.errors import InvalidRequest
from hypercore_agents.kit.relay.headers import body_length, forwardable_request_headers, forwardable_response_headers


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], 0),
        ([(b"content-length", b"12")], 12),
        ([(b"transfer-encoding", b"chunked")], None),
        ([(b"Transfer-Encoding", b" Chunked ")], None),
    ],
)
def test_length_of_a_body(headers: list[tuple[bytes, bytes]], expected: int | None) -> None:
    assert body_length(headers) == expected


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-length", b"1"), (b"transfer-encoding", b"chunked")],
        [(b"transfer-encoding", b"chunked"), (b"content-length", b"1")],
        [(b"content-length", b"1"), (b"content-length", b"1")],
        [(b"content-length", b"1"), (b"Content-Length", b"2")],
        [(b"content-length", b"+1")],
        [(b"content-length", b"1, 1")],
        [(b"content-length", b"0x10")],
        [(b"content-length", b"")],
        [(b"content-length", b"9" * 16)],
        [(b"transfer-encoding", b"gzip, chunked")],
        [(b"transfer-encoding", b"chunked"), (b"transfer-encoding", b"chunked")],
        [(b"transfer-encoding", b"\x0bchunked")],
        [(b"transfer-encoding", b"identity")],
        [(b"host", b"a"), (b"host", b"b")],
        [(b"x-a", b"1\r\nx-hypercore-user: eve")],
        [(b"x-a", b"1\x00")],
        [(b"x a", b"1")],
        [(b"x-a:", b"1")],
        [(b"", b"1")],
    ],
)
def test_ambiguous_framing_is_refused(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(InvalidRequest):
        body_length(headers)


def test_only_end_to_end_request_headers_are_forwarded() -> None:
    passed = forwardable_request_headers(
        [
            (b"Host", b"a"),
            (b"Content-Length", b"3"),
            (b"Connection", b"keep-alive, X-Mine"),
            (b"Keep-Alive", b"timeout=5"),
            (b"X-Mine", b"1"),
            (b"TE", b"trailers"),
            (b"Upgrade", b"websocket"),
            (b"Proxy-Authorization", b"Basic x"),
            (b"X-Hypercore-User", b"eve"),
            (b"Expect", b"100-continue"),
            (b"Authorization", b"Bearer t"),
            (b"Accept", b"a"),
            (b"Accept", b"b"),
        ],
        drop=(b"authorization",),
    )
    assert passed == [(b"accept", b"a"), (b"accept", b"b")]


def test_header_values_that_are_not_utf8_are_refused_with_their_name() -> None:
    with pytest.raises(InvalidRequest) as caught:
        forwardable_request_headers([(b"x-city", b"M\xfcnchen")])
    assert caught.value.details == {"field": "x-city"}


def test_only_end_to_end_response_headers_are_forwarded() -> None:
    headers = [
        (b"Content-Type", b"text/plain"),
        (b"Content-Length", b"3"),
        (b"Connection", b"close, X-Hop"),
        (b"X-Hop", b"1"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Set-Cookie", b"a=b"),
        (b"X-Hypercore-Bearer", b"s"),
        (b"X-Request-Id", b"theirs"),
        (b"Alt-Svc", b"h3"),
    ]
    assert forwardable_response_headers(headers) == [(b"content-type", b"text/plain"), (b"content-length", b"3")]
    assert (b"set-cookie", b"a=b") in forwardable_response_headers(headers, keep_cookies=True)
