"""Which headers cross a relay, and which framing is refused.

A relay parses one message and writes another. Smuggling is possible where two parsers may disagree about where a
message ends, so that whatever could be read in two ways is refused, and framing (`Content-Length`,
`Transfer-Encoding`, `Host`) is never copied but made anew (RFC 9112 §6.3, §11.2).

Rejected: an allow-list of headers for every hop. The Claude API's hop has one (the gateway's); between our own
parts it would only break what users add.
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
_MADE_ANEW = frozenset((b"host", b"content-length", b"expect", REQUEST_ID_HEADER.encode()))
_DROPPED_FROM_ANSWERS = frozenset((b"alt-svc", REQUEST_ID_HEADER.encode()))
_NEVER_ONWARD = _HOP_BY_HOP | _MADE_ANEW
_NEVER_BACK = _HOP_BY_HOP | _DROPPED_FROM_ANSWERS
_NEVER_BACK_NOR_COOKIES = _NEVER_BACK | {b"set-cookie"}
_INTERNAL = INTERNAL_HEADER_PREFIX.encode()
_TOKENS = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:\n[!#$%&'*+.^_`|~0-9A-Za-z-]+)*")
_BAD_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_CHUNKED = -1


def body_length(headers: RawHeaders) -> int | None:
    """Return the announced length of a request's body in bytes, or None when it is chunked; 0 when there is none.

    Raises InvalidRequest for every framing that two parsers could read differently, for duplicates of `Host`, and
    for characters that may not stand in a header.
    """
    pairs = [(name.lower(), value) for name, value in headers]
    names, values = b"\n".join([name for name, _ in pairs]), b"\t".join([value for _, value in pairs])
    if pairs and (_TOKENS.fullmatch(names) is None or names.count(b"\n") != len(pairs) - 1):
        raise InvalidRequest("a header has characters that HTTP does not allow", field="headers")
    if _BAD_VALUE.search(values) is not None:
        raise InvalidRequest("a header has characters that HTTP does not allow", field="headers")
    return framing(pairs)


def framing(headers: RawHeaders) -> int | None:
    """Return and raise what `body_length` does, of headers in lower case whose characters a parser has checked."""
    names = [name for name, _ in headers]
    if names.count(b"host") > 1:
        raise InvalidRequest("the request has more than one Host", field="Host")
    if b"content-length" not in names and b"transfer-encoding" not in names:
        return 0
    length: int | None = None
    for name, value in headers:
        if name == b"content-length":
            if length is not None:
                raise InvalidRequest(
                    "the request says its length more than once; send one Content-Length or chunked, not both",
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
                    "the request says its length more than once; send one Content-Length or chunked, not both",
                    field="Transfer-Encoding",
                )
            length = _CHUNKED
    return None if length == _CHUNKED else length or 0


def forwardable_request_headers(headers: RawHeaders, *, drop: Collection[bytes] = ()) -> list[tuple[bytes, bytes]]:
    """Return a request's headers as they may be passed on: end-to-end ones that are neither ours nor framing.

    `drop` names more that may not, in lower case; so are the names returned. Raises InvalidRequest for a value that is
    not UTF-8.
    """
    passed = _end_to_end(headers, _NEVER_ONWARD, drop)
    if not b"".join([value for _, value in passed]).isascii():
        for name, value in passed:
            try:
                value.decode()
            except UnicodeDecodeError:
                raise InvalidRequest("a header's value is not UTF-8", field=name.decode("latin-1")) from None
    return passed


def forwardable_response_headers(headers: RawHeaders, *, keep_cookies: bool = False) -> list[tuple[bytes, bytes]]:
    """Return an answer's headers as they may be passed back. `Content-Length` stays: the body is not changed."""
    return _end_to_end(headers, _NEVER_BACK if keep_cookies else _NEVER_BACK_NOR_COOKIES)


def _end_to_end(
    headers: RawHeaders, dropped: frozenset[bytes], drop: Collection[bytes] = ()
) -> list[tuple[bytes, bytes]]:
    passed = []
    named: list[bytes] = []
    for written, value in headers:
        name = written.lower()
        if name in dropped:
            if name == b"connection":  # names headers that are for this hop only (RFC 9110 §7.6.1)
                named += [token.strip() for token in value.lower().split(b",")]
        elif not name.startswith(_INTERNAL) and name not in drop:
            passed.append((name, value))
    if named:
        passed = [pair for pair in passed if pair[0] not in named]
    return passed
