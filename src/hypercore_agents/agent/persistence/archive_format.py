"""The format of a workspace archive: a tar stream, compressed on the fly, counted and bounded in both directions.

An archive is a gzip file whose members hold one MiB of tar each. A member whose samples do not shrink is stored
uncompressed, so incompressible data costs little more than its checksum. Memory is bounded by one member and one read.

A tar stream consists of 512-byte headers and padded data (tar(5), the GNU format). `TarCount` parses it without storing
it. It accepts only the entry types that `tar --format=gnu` writes here: with others (pax, multi-volume), tar may read
sizes from elsewhere than the header, and an archive could contain more than was counted.

Rejected: Python's `tarfile` in stream mode, which reads pax headers of any size into memory; one gzip member for the
whole archive, since zlib's level cannot change within a member.
"""

import hashlib
import re
import zlib
from collections.abc import Iterator

MEMBER_BYTES = 1 << 20
_BLOCK = 512
_RECORD = 20 * _BLOCK
"""tar pads its output to whole records."""
_GZIP = 31
"""zlib's window bits for gzip framing."""
_SAMPLE = 16 * 1024
_WORTH_IT = 0.95
_OUTPUT = 256 * 1024
_WITH_DATA, _WITHOUT_DATA = b"0\0S", b"123456"
_NAMES = b"LK"
_OCTAL = re.compile(rb" *[0-7]*[ \0]*")
_SPARSE = ord("S")
LONGEST_PATH = 4_000
"""Bytes of a path below the workspace. The kernel accepts paths of 4,095 bytes, and tar creates files by full path."""
_MOST_CLI_FILES = 5_000
"""Files outside the workspace (`./...`): those that the Claude CLI saved."""


class ArchiveTooLarge(Exception):
    """A workspace is over a limit: in bytes if `in_bytes`, else in files and folders."""

    def __init__(self, limit: int, *, in_bytes: bool) -> None:
        super().__init__(limit)
        self.limit, self.in_bytes = limit, in_bytes


class PathTooLong(Exception):
    """A file's path is longer than tar can create when the archive is unpacked."""


class TarCount:
    """Counts the files and folders and the bytes of their contents in a tar stream. Holes do not count."""

    def __init__(self, limit: int, entries: int) -> None:
        self.bytes = self.entries = 0
        self._cli_files = self._trailer = 0
        self._limit, self._most = limit, entries
        self._partial = b""
        self._skip = 0
        self._ended = False
        self._map_continues = False

    def feed(self, data: bytes) -> None:
        """Count the next piece of the stream. Raises ArchiveTooLarge, PathTooLong, and ValueError for a tar stream that
        this platform did not write."""
        view = memoryview(data)
        while view:
            if self._ended:
                self._trailer += len(view)
                if self._trailer > _RECORD:
                    raise ValueError("a tar stream continues after its end")
                return
            if self._skip and not self._map_continues:
                passed = min(self._skip, len(view))
                self._skip -= passed
                view = view[passed:]
                continue
            wanted = _BLOCK - len(self._partial)
            self._partial += view[:wanted]
            view = view[wanted:]
            if len(self._partial) == _BLOCK:
                block, self._partial = self._partial, b""
                self._block(block)

    def end(self) -> None:
        """Check that the stream was complete. Raises ValueError."""
        if not self._ended or self._partial:
            raise ValueError("the tar stream ends too early")

    def _block(self, block: bytes) -> None:
        if self._map_continues:  # more of a sparse file's map, before its data
            self._add(_BLOCK)
            self._map_continues = bool(block[504])
        elif block.count(0) == _BLOCK:
            self._ended = True
        else:
            self._header(block)

    def _header(self, block: bytes) -> None:
        kind = block[156]
        if sum(block) - sum(block[148:156]) + 8 * ord(" ") != _number(block[148:156]):
            raise ValueError("a tar header's checksum is wrong")
        size = _number(block[124:136])
        if kind in _NAMES:
            if size > LONGEST_PATH:
                raise PathTooLong
            self._add(size)
        elif kind in _WITH_DATA or (kind in _WITHOUT_DATA and size == 0):
            name = block[:100].rstrip(b"\0")
            self._cli_files += not name.startswith(b"./")
            self.entries += name.startswith(b"./") and name != b"./"
            if self.entries > self._most or self._cli_files > _MOST_CLI_FILES:
                raise ArchiveTooLarge(self._most, in_bytes=False)
            self._add(size)
        else:
            raise ValueError(f"a tar entry of type {kind} is not supported")
        self._skip = -(-size // _BLOCK) * _BLOCK
        self._map_continues = kind == _SPARSE and bool(block[482])

    def _add(self, size: int) -> None:
        self.bytes += size
        if self.bytes > self._limit:
            raise ArchiveTooLarge(self._limit, in_bytes=True)


def _number(field: bytes) -> int:
    """Return a number of a tar header: octal text, or big-endian after a set bit."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise ValueError("a tar header has a negative number")
        return int.from_bytes(field[1:], "big")
    if _OCTAL.fullmatch(field) is None:  # int() accepts signs and underscores, tar does not
        raise ValueError("a tar header has a number that is not octal")
    return int(field.strip(b" \0") or b"0", 8)


class Packer:
    """Converts a tar stream into an archive. `limit` is in bytes of contents, `entries` in files and folders."""

    def __init__(self, limit: int, entries: int) -> None:
        self._count = TarCount(limit, entries)
        self._plain = bytearray()
        self._digest = hashlib.sha256()

    def feed(self, data: bytes) -> bytes:
        """Return the next bytes of the archive, if any are complete. Raises as TarCount does."""
        self._count.feed(data)
        self._plain += data
        packed = b""
        while len(self._plain) >= MEMBER_BYTES:
            packed += self._member(MEMBER_BYTES)
        return packed

    def end(self) -> bytes:
        """Return the last bytes of the archive. Raises ValueError when the tar stream was incomplete."""
        self._count.end()
        return self._member(len(self._plain)) if self._plain else b""

    def digest(self) -> str:
        """Return the archive's SHA-256, once it is complete."""
        return self._digest.hexdigest()

    def _member(self, size: int) -> bytes:
        plain = bytes(self._plain[:size])
        del self._plain[:size]
        packing = zlib.compressobj(1 if _shrinks(plain) else 0, zlib.DEFLATED, _GZIP)
        packed = packing.compress(plain) + packing.flush()
        self._digest.update(packed)
        return packed


def _shrinks(plain: bytes) -> bool:
    middle = len(plain) // 2
    sample = plain[:_SAMPLE] + plain[middle : middle + _SAMPLE] + plain[-_SAMPLE:]
    return len(zlib.compress(sample, 1)) < _WORTH_IT * len(sample)


class Unpacker:
    """Converts an archive into its tar stream, in pieces of bounded size at any compression ratio."""

    def __init__(self, limit: int, entries: int) -> None:
        self._count = TarCount(limit, entries)
        self._digest = hashlib.sha256()
        self._stream: zlib._Decompress | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the tar stream's next pieces. Raises as TarCount does, and ValueError for data that is not gzip."""
        self._digest.update(data)
        while data:
            if self._stream is None:
                self._stream = zlib.decompressobj(_GZIP)
            try:
                plain = self._stream.decompress(data, _OUTPUT)
            except zlib.error as error:
                raise ValueError(f"the archive is damaged: {error}") from None
            data = self._stream.unconsumed_tail
            if self._stream.eof:
                data, self._stream = self._stream.unused_data, None
            self._count.feed(plain)
            if plain:
                yield plain

    def end(self) -> str:
        """Return the archive's SHA-256. Raises ValueError when the archive was incomplete."""
        if self._stream is not None:
            raise ValueError("the archive ends too early")
        self._count.end()
        return self._digest.hexdigest()
