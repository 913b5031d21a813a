"""The archive format: the output of tar is counted exactly, and streams that tar never writes are rejected."""

import gzip
import hashlib
import io
import os
import subprocess
import tarfile
import zlib
from pathlib import Path

import pytest

from hypercore_agents.agent.launcher.protocol import pack_command
from hypercore_agents.agent.persistence.archive_format import MEMBER_BYTES, ArchiveTooLarge, Packer, TarCount, Unpacker

LIMIT, ENTRIES = 1 << 30, 1000


def tar_of(root: Path) -> bytes:
    (root / "workspace").mkdir(exist_ok=True)
    return subprocess.run(pack_command(str(root)), cwd=root / "workspace", check=True, capture_output=True).stdout


def packed(plain: bytes, *, limit: int = LIMIT, entries: int = ENTRIES, piece: int = 70_000) -> bytes:
    packer = Packer(limit, entries)
    archive = b"".join(packer.feed(plain[at : at + piece]) for at in range(0, len(plain), piece)) + packer.end()
    assert packer.digest() == hashlib.sha256(archive).hexdigest()
    return archive


def unpacked(archive: bytes, *, limit: int = LIMIT, piece: int = 70_000) -> bytes:
    unpacker = Unpacker(limit, ENTRIES)
    plain = b"".join(part for at in range(0, len(archive), piece) for part in unpacker.feed(archive[at : at + piece]))
    assert unpacker.end() == hashlib.sha256(archive).hexdigest()
    return plain


@pytest.fixture
def root(tmp_path: Path) -> Path:
    workspace = tmp_path / "workspace"
    deep = workspace / ("long" * 30) / ("name" * 30)
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(os.urandom(3 * MEMBER_BYTES))
    (workspace / "text").write_bytes(b"the same line\n" * 200_000)
    (workspace / "link").symlink_to("x" * 300)
    os.link(workspace / "text", workspace / "hard")
    os.mkfifo(workspace / "pipe")
    with (workspace / "sparse").open("wb") as sparse:
        for place in range(40):  # more segments than fit into the header's own map
            sparse.seek(place << 20)
            sparse.write(b"x" * 4096)
    return tmp_path


@pytest.mark.parametrize("piece", [1, 511, 70_000])
def test_every_kind_of_member_is_counted_and_restored(root: Path, piece: int) -> None:
    plain = tar_of(root)
    archive = packed(plain, piece=max(piece, 500))
    assert unpacked(archive, piece=max(piece, 500)) == plain
    assert gzip.decompress(archive) == plain
    count = TarCount(LIMIT, ENTRIES)
    for at in range(0, len(plain), piece) if piece > 1 else range(0, 20_000):
        count.feed(plain[at : at + piece])
    if piece > 1:
        count.end()
        with tarfile.open(fileobj=io.BytesIO(plain)) as known:
            names = known.getnames()
        assert count.entries == len(names) - 1 == 8
        written = 3 * MEMBER_BYTES + 200_000 * 14 + 40 * 4096
        assert 0 <= count.bytes - written < 20_000, "contents, a few names and the sparse file's map"


def test_limits_count_exactly_the_bytes_of_contents(tmp_path: Path) -> None:
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "file").write_bytes(os.urandom(3 * MEMBER_BYTES))
    plain = tar_of(tmp_path)
    archive = packed(plain, limit=3 * MEMBER_BYTES)
    assert unpacked(archive, limit=3 * MEMBER_BYTES) == plain
    with pytest.raises(ArchiveTooLarge):
        packed(plain, limit=3 * MEMBER_BYTES - 1)
    with pytest.raises(ArchiveTooLarge):
        unpacked(archive, limit=3 * MEMBER_BYTES - 1)
    with pytest.raises(ArchiveTooLarge):
        packed(plain, entries=0)


def test_random_bytes_are_stored_and_text_is_compressed(root: Path, tmp_path: Path) -> None:
    archive = packed(tar_of(root))
    assert 3 * MEMBER_BYTES < len(archive) < 3.2 * MEMBER_BYTES


def test_a_compression_bomb_is_unpacked_in_small_pieces() -> None:
    content = io.BytesIO()
    member = tarfile.TarInfo("./a")
    member.size = 1 << 27
    with tarfile.open(fileobj=content, mode="w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    bomb = zlib.compressobj(9, zlib.DEFLATED, 31)
    pieces = Unpacker(LIMIT, ENTRIES).feed(bomb.compress(content.getvalue()) + bomb.flush())
    assert max(map(len, pieces)) <= 256 * 1024


@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_that_this_tar_never_writes_are_rejected(format_: int) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=format_) as archive:
        member = tarfile.TarInfo("./a")
        if format_ == tarfile.PAX_FORMAT:
            member.pax_headers = {"size": "1000000"}  # tar would use this size instead of the header's
        else:
            member.type = tarfile.CONTTYPE
        archive.addfile(member)
    with pytest.raises(ValueError, match="not supported"):
        packed(content.getvalue())


@pytest.mark.parametrize("broken", ["short", "checksum", "more"])
def test_an_incomplete_tar_stream_is_rejected(tmp_path: Path, broken: str) -> None:
    plain = bytearray(tar_of(tmp_path))
    if broken == "short":
        del plain[512:]
    elif broken == "checksum":
        plain[0] ^= 1
    else:
        plain += bytes(1 << 20)
    with pytest.raises(ValueError, match="tar"):
        packed(bytes(plain))


@pytest.mark.parametrize("size", [b"-0000001000\0", b"0000001_000\0", b"+0000001000\0"])
def test_a_size_that_only_python_parses_is_rejected(tmp_path: Path, size: bytes) -> None:
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "file").write_bytes(b"x" * 512)
    plain = bytearray(tar_of(tmp_path))
    header = plain.index(b"./file")
    plain[header + 124 : header + 136] = size
    plain[header + 148 : header + 156] = b" " * 8
    plain[header + 148 : header + 156] = b"%06o\0 " % sum(plain[header : header + 512])
    with pytest.raises(ValueError, match="not octal"):
        packed(bytes(plain))
