"""A file system per session, in a sparse file: the session's folder is its mount, its size is the session's limit.

    <state>/images/template.ext4       empty, formatted once per launcher
    <state>/images/<session>.ext4      a sparse copy of it; what the session wrote is all that it takes of the host
    <state>/images/promised            bytes that the images of this agent may grow to together (`promises`)
    <state>/sessions/<session>         the mount

What lives where makes cleaning up unnecessary. The mounts are in the launcher's own mount namespace and end with it,
however it ends; a loop device ends with its mount (`loops`); the files lie in the agent's folder, which is removed with
the agent. A session never reaches its image's bytes: they are root's and outside of its view, so the kernel parses
nothing but what `mke2fs` and itself wrote.

The file system has no journal and no barriers: it never outlives the launcher, so there is nothing to recover. Freed
blocks are punched out of the file (`discard`), which gives them back to the host.

A spare is mounted ahead, by a child of the launcher, and moved to its place when a session comes: mounting waits for
the disk and for kernel threads, which takes two milliseconds on an idle machine and twenty times that on a busy one.

Rejected: full-size files (a limit would cost its size at once). One image per agent with quotas inside: kernels without
the quota module are where images are needed.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import subprocess
from contextlib import suppress

from hypercore_agents.agent.launcher import kernel, loop_devices
from hypercore_agents.agent.launcher.reservations import DiskReservations
from hypercore_agents.agent.launcher.storage import PARTS, Storage, Usage
from hypercore_agents.kit.linux.disk_reservations import TEMPLATE

_MB = 1 << 20
_MKFS = ("/usr/sbin/mke2fs", "/sbin/mke2fs")
_MKFS_SECONDS = 60
_FEATURES = "^has_journal,^resize_inode,^quota,^project"
_OPTIONS = "discard,noinit_itable,nobarrier,errors=remount-ro"
_FLAGS = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOATIME
_FICLONE = 0x40049409
_INODE_BYTES = 4096
"""At most one file for so many bytes, so that a small image is not filled by its inode tables."""


class Images(Storage):
    """Makes, mounts and removes images. Needs a mount namespace of its own. `siblings`: see `DiskReservations`."""

    method = "image"

    def __init__(self, state: str, limit_mb: int, files: int, siblings: str | None) -> None:
        super().__init__("")
        self._limit = limit_mb * _MB
        self._folder = os.path.join(os.path.realpath(state), "images")
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        self._template = os.path.join(self._folder, TEMPLATE)
        _format(self._template, self._limit, min(files, self._limit // _INODE_BYTES))
        self._promises = DiskReservations(self._folder, siblings)
        self._spares = itertools.count(1)
        self._spare_place = os.path.join(self._folder, "spare")
        self._spare: str | None = None
        self._making_spare = self._spare_failed = False
        """After one failed none is made until a session came."""
        self._mounts: dict[str, str] = {}
        self._active: set[str] = set()

    def probe(self) -> None:
        """Make, mount and remove an image. Raises OSError where that does not work."""
        path = os.path.join(self._folder, "probe")
        self._mount("probe", path)
        try:
            if os.statvfs(path).f_files <= 0:
                raise OSError("the mounted image has no inodes")
        finally:
            self.remove("probe", path)

    def make(self, session: str, path: str, uid: int) -> None:
        """Make and mount an image. Raises NoDisk where the host cannot hold it, or OSError."""
        self._promises.change(session, self._limit)
        try:
            if not self._take_spare(session, path):
                self._mount(session, path)
        except BaseException:
            self._promises.change(session, 0)
            raise
        self._mounts[session] = path
        self._active.add(session)

    def next_spare(self) -> str | None:
        """Return a name while there is no spare and none is being made: there is one place for it."""
        if self._spare is not None or self._making_spare or self._spare_failed:
            return None
        self._making_spare = True
        return f"spare-{next(self._spares)}"

    def prepare(self, spare: str) -> None:
        """Mount an image beside its file, with the folders that every session has."""
        self._mount(spare, self._spare_place)
        for part in PARTS:
            os.mkdir(os.path.join(self._spare_place, part), 0o700)

    def prepared(self, spare: str, *, usable: bool) -> None:
        """Keep the spare for the next session."""
        self._making_spare, self._spare_failed = False, not usable
        self._spare = spare if usable else None

    def wake(self, session: str) -> None:
        """Promise the session its whole limit again. Raises NoDisk."""
        if session in self._mounts and session not in self._active:
            self._promises.change(session, self._limit)
            self._active.add(session)

    def rest(self, session: str) -> None:
        """Promise the session no more than it has: it cannot write. What was removed while it rested goes back too."""
        if session in self._mounts:
            self._active.discard(session)
            with suppress(OSError):
                self._promises.change(session, self._most_on_host(session))

    def usage(self, session: str) -> Usage | None:
        """Return what the file system says; what it keeps for itself (2 %) counts as used."""
        path = self._mounts.get(session)
        if path is None:
            return None
        seen = os.statvfs(path)
        used = (seen.f_blocks - seen.f_bavail) * seen.f_frsize
        return Usage(used, seen.f_blocks * seen.f_frsize, seen.f_files - seen.f_ffree, seen.f_files)

    def remove(self, session: str, path: str) -> None:
        """Unmount and delete the image; what is in it needs no look. A mount that is busy goes with its last user."""
        try:
            kernel.unmount(path)
        except OSError as error:
            if error.errno == errno.EBUSY:
                kernel.unmount(path, lazily=True)
            elif error.errno not in (errno.EINVAL, errno.ENOENT):  # not mounted, or not there
                raise
        with suppress(FileNotFoundError):
            os.rmdir(path)
        with suppress(FileNotFoundError):
            os.unlink(self._image(session))

    def forget(self, session: str) -> None:
        """Take back what was promised to the session."""
        self._mounts.pop(session, None)
        self._active.discard(session)
        with suppress(OSError):
            self._promises.change(session, 0)

    def _image(self, session: str) -> str:
        return os.path.join(self._folder, f"{session}.ext4")

    def _mount(self, session: str, path: str) -> None:
        image = self._image(session)
        with suppress(FileExistsError):  # of a spare before
            os.mkdir(path, 0o700)
        try:
            file = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                _copy(self._template, file)
                device, held = loop_devices.attach(file)
            finally:
                os.close(file)
            try:
                kernel.mount(device, path, "ext4", _FLAGS, _OPTIONS)
            finally:
                os.close(held)
            os.rmdir(os.path.join(path, "lost+found"))
        except BaseException:
            with suppress(OSError):
                self.remove(session, path)
            raise

    def _take_spare(self, session: str, path: str) -> bool:
        """Move the spare's mount and file to a session's place; False when there is none, and nothing is left."""
        spare, self._spare = self._spare, None
        self._spare_failed = False
        if spare is None:
            return False
        try:
            os.mkdir(path, 0o700)
            kernel.mount(self._spare_place, path, flags=kernel.MS_MOVE)
            os.rename(self._image(spare), self._image(session))
        except OSError:
            for name, mounted in ((session, path), (spare, self._spare_place)):
                with suppress(OSError):
                    self.remove(name, mounted)
            return False
        return True

    def _most_on_host(self, session: str) -> int:
        """Return what the image can take of the host at most while nothing new is written to it.

        More than it takes now: what was written may still be in memory, with the inode tables that it needs.
        """
        used = self.usage(session)
        if used is None:
            return 0
        overhead = self._limit - used.byte_limit
        return min(self._limit, used.bytes + min(overhead, _MB + used.files * 4096))


def _format(path: str, size: int, files: int) -> None:
    program = next((program for program in _MKFS if os.path.exists(program)), None)
    if program is None:
        raise OSError("mke2fs is not installed: apt-get install -y e2fsprogs")
    with suppress(FileNotFoundError):
        os.unlink(path)
    with open(path, "xb") as file:
        file.truncate(size)
    command = [program, "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-O", _FEATURES, "-N", str(files),
               "-E", "lazy_itable_init=1", path]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=_MKFS_SECONDS, check=False)  # noqa: S603 (our own)
    if done.returncode:
        raise OSError(f"mke2fs failed: {done.stderr.decode(errors='replace').strip()[:500]}")


def _copy(template: str, target: int) -> None:
    """Copy a file's data and keep its holes; as a reflink where the file system can."""
    source = os.open(template, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.ioctl(target, _FICLONE, source)
            return
        size = os.fstat(source).st_size
        os.ftruncate(target, size)
        position = 0
        while (start := _seek(source, position, os.SEEK_DATA)) is not None:
            position = _seek(source, start, os.SEEK_HOLE) or size
            while start < position:
                data = os.pread(source, min(position - start, _MB), start)
                if not data:
                    raise OSError(errno.EIO, f"{template} became shorter while it was copied")
                start += os.pwrite(target, data, start)
    finally:
        os.close(source)


def _seek(file: int, position: int, how: int) -> int | None:
    try:
        return os.lseek(file, position, how)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise
