"""A bound on a JSON text before it is parsed: how many values it may have.

A parser's time and memory grow with the number of values, not with the bytes: 28 MB of `{},{},…` take seconds and a
gigabyte, 28 MB of text in one string some ten milliseconds. So values are counted while the text arrives, chunk by
chunk, and a text that has too many is refused before any parser sees it.

Invariants:

- How the bytes are cut into chunks changes nothing.
- Of every valid JSON text the count is exact. Of any other text it is exact up to the first byte that is not JSON, and
  a parser allocates nothing beyond that byte.
- Work per byte is constant and done by C code in pieces of at most `_PIECE` bytes.

Values are counted by the commas and opening brackets outside of strings: a text with n of them has at most n + 1
values, keys not counted. A cheap upper bound, in which the characters inside strings count too, is enough for nearly
all texts; only one with more than `_CHEAP` of them is scanned for strings. Depth is not bounded here: both parsers in
use stop at a depth of their own, at once.

Rejected: an incremental parser in Python (a hundred times slower); a regular expression that deletes strings (three
times slower, and it would hold the whole text).
"""

from hypercore_agents.api.errors import InvalidRequest

_PIECE = 64 * 1024
_CHEAP = 10_000


class JsonBounds:
    """Counts one text. `values` is the most it may have; `field` is named in errors."""

    def __init__(self, values: int, *, field: str = "body") -> None:
        self._most = values
        self._field = field
        self._bound = 0
        self._unscanned: list[bytes] | None = []
        self._in_string = False
        self._escape = b""
        self._values = 0

    @property
    def most(self) -> int:
        """The most values that there can be in what came so far."""
        return self._bound if self._unscanned is not None else self._values

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes. Raises InvalidRequest when there are too many values."""
        if self._unscanned is None:
            self._scan(chunk)
            return
        self._unscanned.append(chunk)
        self._bound += chunk.count(b",") + chunk.count(b"[") + chunk.count(b"{")
        if self._bound > min(self._most, _CHEAP):  # early, so that little has to be scanned at once
            waiting, self._unscanned = self._unscanned, None
            for piece in waiting:
                self._scan(piece)

    def _scan(self, chunk: bytes) -> None:
        for start in range(0, len(chunk), _PIECE):
            self._count(self._outside_strings(chunk[start : start + _PIECE]))

    def _outside_strings(self, piece: bytes) -> bytes:
        """Return what of a piece stands outside of strings."""
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
        if self._values > self._most:
            raise InvalidRequest(
                f"the JSON has more than {self._most} values; send fewer, or put them into strings",
                field=self._field,
                details={"limit_values": self._most},
            )
