"""Which headers cross a relay, and which framings of requests are refused.

A relay parses one message and writes another. Request smuggling is possible where two parsers disagree about the end of
a message. So ambiguous framing is refused, and framing headers (`Content-Length`, `Transfer-Encoding`, `Host`) are
never copied but written again (RFC 9112 §6.3, §11.2).

Rejected: a list of allowed headers for every hop. The gateway has one for the Claude API; between the platform's own
parts it would only drop headers that users add.
"""

import re
from collections.abc import Collection, Iterable

from hypercore_agents.api.errors import InvalidRequest
from hypercore_agents.api.internal import INTERNAL_HEADER_PREFIX, REQUEST_ID_HEADER

RawHeaders = Iterable[tuple[bytes, bytes]]

_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    )
)
_REWRITTEN = frozenset((b"host", b"content-length", b"expect", REQUEST_ID_HEADER.encode()))
_DROPPED_FROM_RESPONSES = frozenset((b"alt-svc", REQUEST_ID_HEADER.encode()))
_REQUEST_DROPPED = _HOP_BY_HOP | _REWRITTEN
_RESPONSE_DROPPED = _HOP_BY_HOP | _DROPPED_FROM_RESPONSES
_RESPONSE_AND_COOKIES_DROPPED = _RESPONSE_DROPPED | {b"set-cookie"}
_INTERNAL = INTERNAL_HEADER_PREFIX.encode()
_TOKENS = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:\n[!#$%&'*+.^_`|~0-9A-Za-z-]+)*")
_BAD_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_CHUNKED = -1


def body_length(headers: RawHeaders) -> int | None:
    """Return the length of a request's body in bytes: None if it is chunked, 0 if there is none.

    Raises InvalidRequest for ambiguous framing, for more than one `Host`, and for characters that headers must not
    contain.
    """
    pairs = [(name.lower(), value) for name, value in headers]
    names, values = b"\n".join([name for name, _ in pairs]), b"\t".join([value for _, value in pairs])
    if pairs and (_TOKENS.fullmatch(names) is None or names.count(b"\n") != len(pairs) - 1):
        raise InvalidRequest("a header contains characters that HTTP does not allow", field="headers")
    if _BAD_VALUE.search(values) is not None:
        raise InvalidRequest("a header contains characters that HTTP does not allow", field="headers")
    return framing(pairs)


def framing(headers: RawHeaders) -> int | None:
    """Do what `body_length` does for headers with names in lower case whose characters a parser has checked."""
    names = [name for name, _ in headers]
    if names.count(b"host") > 1:
        raise InvalidRequest("the request has more than one Host header", field="Host")
    if b"content-length" not in names and b"transfer-encoding" not in names:
        return 0
    length: int | None = None
    for name, value in headers:
        if name == b"content-length":
            if length is not None:
                raise InvalidRequest(
                    "the request states its length more than once; send either one Content-Length or chunked encoding",
                    field="Content-Length",
                )
            if not value.isdigit() or len(value) > 15:
                raise InvalidRequest("Content-Length must be a whole number", field="Content-Length")
            length = int(value)
        elif name == b"transfer-encoding":
            if value.strip().lower() != b"chunked":
                raise InvalidRequest("the only transfer coding accepted is chunked", field="Transfer-Encoding")
            if length is not None:
                raise InvalidRequest(
                    "the request states its length more than once; send either one Content-Length or chunked encoding",
                    field="Transfer-Encoding",
                )
            length = _CHUNKED
    return None if length == _CHUNKED else length or 0


def forwardable_request_headers(headers: RawHeaders, *, drop: Collection[bytes] = ()) -> list[tuple[bytes, bytes]]:
    """Return the headers of a request to pass on, names in lower case: no hop-by-hop, internal or framing headers.

    `drop` names further headers to drop, in lower case. Raises InvalidRequest for a value that is not UTF-8.
    """
    passed = _end_to_end(headers, _REQUEST_DROPPED, drop)
    if not b"".join([value for _, value in passed]).isascii():
        for name, value in passed:
            try:
                value.decode()
            except UnicodeDecodeError:
                raise InvalidRequest("the header's value is not UTF-8", field=name.decode("latin-1")) from None
    return passed


def forwardable_response_headers(headers: RawHeaders, *, keep_cookies: bool = False) -> list[tuple[bytes, bytes]]:
    """Return the headers of a response to pass on. `Content-Length` is one of them: the body is not changed."""
    return _end_to_end(headers, _RESPONSE_DROPPED if keep_cookies else _RESPONSE_AND_COOKIES_DROPPED)


def _end_to_end(
    headers: RawHeaders, dropped: frozenset[bytes], drop: Collection[bytes] = ()
) -> list[tuple[bytes, bytes]]:
    passed = []
    named: list[bytes] = []
    for written, value in headers:
        name = written.lower()
        if name in dropped:
            if name == b"connection":  # lists further hop-by-hop headers (RFC 9110 §7.6.1)
                named += [token.strip() for token in value.lower().split(b",")]
        elif not name.startswith(_INTERNAL) and name not in drop:
            passed.append((name, value))
    if named:
        passed = [pair for pair in passed if pair[0] not in named]
    return passed
