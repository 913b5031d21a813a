"""File operations on a workspace, run as the session: read, write, delete, list.

The launcher forks this into the session's namespaces, as the session's user; without a launcher it runs as a separate
program. Standard input and output are one socket. The output is one line of JSON, `{"error": kind}` or as below, and
then bytes.

    read    → {"size": n}, then exactly n bytes, or fewer if the file was truncated meanwhile
    write   → {"ready": true}; then reads frames, each after its length (4 bytes, big-endian), the last one empty; then
              {"size": n}. Input that ends without the empty frame leaves the old file unchanged.
    delete  → {"deleted": true}
    list    → {"listed": true}, then entries in the order of their paths: kind, size and time of the last change, each
              followed by a tab, and the path, followed by a null byte

Until it is complete, an incoming file is named `.incoming.` and 16 hex digits. Such a file is in no list and no
archive. If its writer was killed, the next list, or the next write to the same folder, deletes it once it is
`LEFTOVER_SECONDS` old.

A file is opened once; its size and content come from that descriptor. Links are followed if they stay inside of the
workspace. Swapping a link in between gains nothing: the operation has only the session's rights. No module may be
imported during an operation: the interpreter's files are not in a session's view.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import sys
import time
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MOST_LEVELS = 200
"""Maximum depth of folders in a workspace. `write` creates no deeper ones; a scan cannot measure them (`disk_scan`)."""

LEFTOVER_SECONDS = 600.0
"""Age, since the last write, after which an incomplete file is known to have no writer."""
_INCOMING = re.compile(rb"\.incoming\.[0-9a-f]{16}")

_CHUNK = 256 * 1024
_IN, _OUT = 0, 1
_KINDS = {
    errno.EACCES: "denied",
    errno.EPERM: "denied",
    errno.EROFS: "denied",
    errno.ENOENT: "missing",
    errno.ENOTDIR: "below_a_file",
    errno.EISDIR: "folder",
    errno.EEXIST: "below_a_file",
    errno.ENOTEMPTY: "not_empty",
    errno.ENAMETOOLONG: "too_long",
    errno.ELOOP: "links",
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
    errno.EFBIG: "full",
}


class _Refused(Exception):
    """The operation is refused; the message is the `error` kind of the reply."""


def work_on(workspace: str, work: Sequence[str]) -> int:
    """Run one operation with its arguments. Return an exit status."""
    try:
        _OPERATIONS[work[0]](os.fsencode(os.path.realpath(workspace)), *work[1:])
    except _Refused as refused:
        _reply({"error": str(refused)})
    except OSError as error:
        kind = _KINDS.get(error.errno or 0, "other")
        if kind == "below_a_file" and work[0] != "write":
            kind = "missing"
        _reply({"error": kind, "cause": os.strerror(error.errno or 0)})
    return 0


def writes(work: Sequence[str]) -> bool:
    """Return whether an operation may take space."""
    return work[:1] == ["write"]


def _read(root: bytes, path: str, limit: str) -> None:
    target = _inside(root, os.path.realpath(_below(root, path)))
    descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC)
    size = _regular(os.fstat(descriptor)).st_size
    if size > int(limit):
        raise _Refused("too_large")
    _reply({"size": size})
    sent = 0
    while sent < size:
        count = os.sendfile(_OUT, descriptor, sent, min(_CHUNK, size - sent))
        if not count:
            return
        sent += count


def _write(root: bytes, path: str, limit: str) -> None:
    target = _inside(root, os.path.realpath(_below(root, path)))
    if target[len(root) + 1 :].count(b"/") > MOST_LEVELS:
        raise _Refused("too_deep")
    with suppress(FileNotFoundError):
        _regular(os.lstat(target))
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    for name in filter(_INCOMING.fullmatch, os.listdir(folder)):
        leftover = os.path.join(folder, name)
        with suppress(OSError):
            _delete_leftover(leftover, os.lstat(leftover))
    incoming = os.path.join(folder, b".incoming." + os.urandom(8).hex().encode())
    descriptor = os.open(incoming, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _reply({"ready": True})
        size = 0
        while frame := int.from_bytes(_exactly(4), "big"):
            size += frame
            if size > int(limit):
                raise _Refused("too_large")
            while frame:
                piece = os.read(_IN, min(frame, _CHUNK))
                if not piece:
                    raise _Refused("cut")
                frame -= len(piece)
                while piece:
                    piece = piece[os.write(descriptor, piece) :]
        os.fchmod(descriptor, 0o644)
        os.close(descriptor)
        os.replace(incoming, target)
    except BaseException:
        os.unlink(incoming)
        raise
    _reply({"size": size})


def _delete(root: bytes, path: str) -> None:
    above, name = os.path.split(_below(root, path))
    folder = os.path.realpath(above)
    target = os.path.join(folder if folder == root else _inside(root, folder), name)
    if stat.S_ISDIR(os.lstat(target).st_mode):
        os.rmdir(target)
    else:
        os.unlink(target)
    _reply({"deleted": True})


def _list(root: bytes, after: str, most: str) -> None:
    start = tuple(os.fsencode(after).split(b"/")) if after else ()
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    _reply({"listed": True})
    left = int(most)
    unsent = b""
    for path, info in _walk(top, b"", start, 0):
        kind = "f" if stat.S_ISREG(info.st_mode) else "d" if stat.S_ISDIR(info.st_mode) else "o"
        unsent += f"{kind}\t{info.st_size}\t{info.st_mtime}\t".encode() + path + b"\0"
        left -= 1
        if len(unsent) > _CHUNK or not left:
            _send(unsent)
            unsent = b""
        if not left:
            return
    _send(unsent)


def _walk(folder: int, prefix: bytes, after: tuple[bytes, ...], level: int) -> Iterator[tuple[bytes, os.stat_result]]:
    """Yield the entries below a folder, each folder before its contents. `after`: only entries after this path."""
    try:
        for name in sorted(map(os.fsencode, os.listdir(folder))):
            on_the_way = bool(after) and name == after[0]
            if after and name < after[0]:
                continue
            try:
                info = os.lstat(name, dir_fd=folder)
            except OSError:
                continue  # deleted meanwhile
            if _INCOMING.fullmatch(name) and stat.S_ISREG(info.st_mode):
                with suppress(OSError):
                    _delete_leftover(name, info, folder)
                continue
            if not on_the_way:
                yield prefix + name, info
            if stat.S_ISDIR(info.st_mode) and level < MOST_LEVELS:
                try:
                    below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                except OSError:
                    continue  # unreadable by its mode, or deleted
                yield from _walk(below, prefix + name + b"/", after[1:] if on_the_way else (), level + 1)
    finally:
        os.close(folder)


def _delete_leftover(path: bytes, info: os.stat_result, folder: int | None = None) -> None:
    if stat.S_ISREG(info.st_mode) and time.time() - info.st_mtime > LEFTOVER_SECONDS:
        os.unlink(path, dir_fd=folder)


def _below(root: bytes, path: str) -> bytes:
    return os.path.join(root, os.fsencode(path))


def _inside(root: bytes, target: bytes) -> bytes:
    if not target.startswith(root + b"/"):
        raise _Refused("outside")
    return target


def _regular(info: os.stat_result) -> os.stat_result:
    if stat.S_ISDIR(info.st_mode):
        raise _Refused("folder")
    if not stat.S_ISREG(info.st_mode):
        raise _Refused("not_a_file")
    return info


def _exactly(size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = os.read(_IN, size - len(data))
        if not piece:
            raise _Refused("cut")
        data += piece
    return data


def _reply(reply: dict[str, object]) -> None:
    _send(json.dumps(reply).encode() + b"\n")


def _send(data: bytes) -> None:
    while data:
        data = data[os.write(_OUT, data) :]


_OPERATIONS: dict[str, Callable[..., None]] = {"read": _read, "write": _write, "delete": _delete, "list": _list}


if __name__ == "__main__":
    sys.exit(work_on(sys.argv[1], sys.argv[2:]))
