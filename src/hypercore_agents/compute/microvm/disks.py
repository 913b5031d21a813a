"""Scratch disks: sparse files with an empty ext4 file system, created once per size and copied for every VM.

The file system has the quota feature: the guest's launcher sets a quota for each session's user (`launcher.quotas`). A
clone gets the disk as it was when its template's snapshot was taken, because the guest had it mounted. Copies preserve
holes. All functions block.

Rejected: qcow2 overlays (one more parser that processes a guest's writes, and a base file that must never change).
"""

import contextlib
import errno
import fcntl
import os
import subprocess
from pathlib import Path

from hypercore_agents.compute.base import SandboxError

_FICLONE = 0x40049409
_CHUNK = 1 << 20
_MKFS = ("/usr/sbin/mke2fs", "/sbin/mke2fs")
_MKFS_SECONDS = 120


def empty_disk(folder: Path, size_mb: int) -> Path:
    """Return the empty disk of this size, creating it if necessary. Raises SandboxError or OSError."""
    path = folder / f"scratch-{size_mb}.ext4"
    if path.exists():
        return path
    program = next((program for program in _MKFS if os.path.exists(program)), None)
    if program is None:
        raise SandboxError("mke2fs is not installed: apt-get install -y e2fsprogs")
    new = folder / f".scratch-{size_mb}-{os.getpid()}"
    try:
        with new.open("wb") as file:
            file.truncate(size_mb << 20)
        arguments = ["-q", "-F", "-t", "ext4", "-m", "0", "-O", "quota,project", "-E"]
        options = "lazy_itable_init=0,lazy_journal_init=1,quotatype=usrquota:prjquota"
        done = subprocess.run(  # noqa: S603 (our own program and arguments)
            [program, *arguments, options, str(new)],
            env={"PATH": os.defpath},
            capture_output=True,
            timeout=_MKFS_SECONDS,
            check=False,
        )
        if done.returncode:
            raise SandboxError(f"mke2fs failed: {done.stderr.decode(errors='replace').strip()[:500]}")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    return path


def copy_disk(source: Path, target: Path, uid: int | None = None) -> None:
    """Copy a disk, by reflink if the file system supports it, and give it to a user. Raises OSError."""
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with source.open("rb") as original, open(descriptor, "wb") as copy:
        try:
            fcntl.ioctl(copy, _FICLONE, original.fileno())
        except OSError:
            _copy_data(original.fileno(), copy.fileno(), os.fstat(original.fileno()).st_size)
        if uid is not None:
            os.fchown(copy.fileno(), uid, uid)


def allocated_mb(disk: Path) -> int:
    """Return the space that a sparse disk takes on the host, in MB; 0 if it does not exist."""
    with contextlib.suppress(OSError):
        return disk.stat().st_blocks * 512 >> 20
    return 0


def _copy_data(source: int, target: int, size: int) -> None:
    os.ftruncate(target, size)
    position = 0
    with contextlib.suppress(_AtEnd):
        while position < size:
            start = _seek(source, position, os.SEEK_DATA)
            end = _seek(source, start, os.SEEK_HOLE)
            os.lseek(source, start, os.SEEK_SET)
            os.lseek(target, start, os.SEEK_SET)
            while start < end:
                copied = os.sendfile(target, source, None, min(end - start, _CHUNK))
                if not copied:
                    raise OSError(errno.EIO, "the disk became shorter while it was copied")
                start += copied
            position = end


class _AtEnd(Exception):
    pass


def _seek(descriptor: int, position: int, how: int) -> int:
    try:
        return os.lseek(descriptor, position, how)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise _AtEnd from None
        raise
