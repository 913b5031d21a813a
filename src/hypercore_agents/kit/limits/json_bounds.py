"""Limits the number of values in a JSON text before it is parsed.

A parser's time and memory grow with the number of values, not with the bytes: 28 MB of `{},{},…` take seconds and a
gigabyte, 28 MB of text in one string some ten milliseconds. So values are counted while the text arrives, chunk by
chunk, and a text with too many values is refused before it is parsed.

Invariants:

- The result does not depend on how the bytes are split into chunks.
- For valid JSON the count is exact. For other text it is exact up to the first byte that is not JSON, and a parser
  allocates nothing beyond that byte.
- Work per byte is constant and done by C code in pieces of at most `_PIECE` bytes.

Values are counted by the commas and opening brackets outside of strings: a text with n of them has at most n + 1
values, without keys. For most texts a cheap upper bound is enough, which also counts characters inside strings; only a
text with more than `_CHEAP` of them is scanned for strings. Depth is not limited here, because both parsers in use
have limits of their own.

Rejected: an incremental parser in Python (a hundred times slower); a regular expression that deletes strings (three
times slower, and it needs the whole text).
"""

from hypercore_agents.api.errors import InvalidRequest

_PIECE = 64 * 1024
_CHEAP = 10_000


class JsonBounds:
    """Counts the values of one text. `values` is their maximum; errors name `field`."""

    def __init__(self, values: int, *, field: str = "body") -> None:
        self._limit = values
        self._field = field
        self._bound = 0
        self._unscanned: list[bytes] | None = []
        self._in_string = False
        self._escape = b""
        self._values = 0

    @property
    def upper_bound(self) -> int:
        """An upper bound for the values in the text received so far."""
        return self._bound if self._unscanned is not None else self._values

    def feed(self, chunk: bytes) -> None:
        """Count the next bytes. Raises InvalidRequest if there are too many values."""
        if self._unscanned is None:
            self._scan(chunk)
            return
        self._unscanned.append(chunk)
        self._bound += chunk.count(b",") + chunk.count(b"[") + chunk.count(b"{")
        if self._bound > min(self._limit, _CHEAP):  # early, so that only little text is scanned at once
            waiting, self._unscanned = self._unscanned, None
            for piece in waiting:
                self._scan(piece)

    def _scan(self, chunk: bytes) -> None:
        for start in range(0, len(chunk), _PIECE):
            self._count(self._outside_strings(chunk[start : start + _PIECE]))

    def _outside_strings(self, piece: bytes) -> bytes:
        """Return the parts of a piece that are outside of strings."""
        if self._escape:
            piece, self._escape = self._escape + piece, b""
        if b"\\" in piece:
            if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
                piece, self._escape = piece[:-1], b"\\"
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.split(b'"')
        outside = b"".join(parts[1 if self._in_string else 0 :: 2])
        if not len(parts) % 2:
            self._in_string = not self._in_string
        return outside

    def _count(self, outside: bytes) -> None:
        self._values += outside.count(b",") + outside.count(b"[") + outside.count(b"{")
        if self._values > self._limit:
            raise InvalidRequest(
                f"the JSON has more than {self._limit} values; send fewer, or put them into strings",
                field=self._field,
                details={"limit_values": self._limit},
            )
