"""Image storage: a file system per session in a sparse file, mounted as the session's folder; its size is the limit.

    <state>/images/template.ext4       empty, formatted once per launcher
    <state>/images/<session>.ext4      a sparse copy of it; takes only what the session wrote
    <state>/images/promised            bytes that the images of this agent may grow to together (`reservations`)
    <state>/sessions/<session>         the mount

No cleanup is needed after a crash. The mounts are in the launcher's own mount namespace and end with it; a loop device
ends with its mount (`loop_devices`); the files are in the agent's folder, which is removed with the agent. A session
never reaches the bytes of its image: root owns them and they are outside of its view, so the kernel parses only what
`mke2fs` and the kernel itself wrote.

The file system has no journal and no barriers: it never outlives the launcher, so there is nothing to recover. Freed
blocks are punched out of the file (`discard`), which returns them to the host.

A spare is an image that a worker mounts in advance and that is moved into place for the next new session. Mounting
waits for the disk and for kernel threads: two milliseconds on an idle machine and twenty times that on a busy one.

Rejected: full-size files (a limit would take its size at once). One image per agent with quotas inside: the kernels
that need images are those without the quota module.
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
"""One file per so many bytes at most, so that inode tables do not fill a small image."""


class ImageStorage(Storage):
    """Creates, mounts and removes images. Needs its own mount namespace. `siblings`: see `DiskReservations`."""

    method = "image"

    def __init__(self, state: str, limit_mb: int, files: int, siblings: str | None) -> None:
        super().__init__("")
        self._limit = limit_mb * _MB
        self._folder = os.path.join(os.path.realpath(state), "images")
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        self._template = os.path.join(self._folder, TEMPLATE)
        _format(self._template, self._limit, min(files, self._limit // _INODE_BYTES))
        self._reservations = DiskReservations(self._folder, siblings)
        self._spare_numbers = itertools.count(1)
        self._spare_folder = os.path.join(self._folder, "spare")
        self._spare: str | None = None
        self._preparing_spare = self._spare_failed = False
        """After a failure, no spare is prepared until the next session."""
        self._mounts: dict[str, str] = {}
        self._active: set[str] = set()

    def probe(self) -> None:
        """Create, mount and remove an image. Raises OSError if that does not work here."""
        path = os.path.join(self._folder, "probe")
        self._mount("probe", path)
        try:
            if os.statvfs(path).f_files <= 0:
                raise OSError("the mounted image has no inodes")
        finally:
            self.remove("probe", path)

    def create(self, session: str, path: str, uid: int) -> None:
        """Create and mount an image. Raises InsufficientDisk if the host cannot hold it, or OSError."""
        self._reservations.set(session, self._limit)
        try:
            if not self._take_spare(session, path):
                self._mount(session, path)
        except BaseException:
            self._reservations.set(session, 0)
            raise
        self._mounts[session] = path
        self._active.add(session)

    def next_spare(self) -> str | None:
        """Return a name if there is no spare and none is being prepared: one folder holds one spare."""
        if self._spare is not None or self._preparing_spare or self._spare_failed:
            return None
        self._preparing_spare = True
        return f"spare-{next(self._spare_numbers)}"

    def prepare_spare(self, spare: str) -> None:
        """Mount an image in the spare's folder and create the folders of a session in it."""
        self._mount(spare, self._spare_folder)
        for part in PARTS:
            os.mkdir(os.path.join(self._spare_folder, part), 0o700)

    def spare_prepared(self, spare: str, *, usable: bool) -> None:
        """Record the spare for the next session."""
        self._preparing_spare, self._spare_failed = False, not usable
        self._spare = spare if usable else None

    def activate(self, session: str) -> None:
        """Reserve the session's full limit again. Raises InsufficientDisk."""
        if session in self._mounts and session not in self._active:
            self._reservations.set(session, self._limit)
            self._active.add(session)

    def deactivate(self, session: str) -> None:
        """Reserve only what the session uses: it cannot write. Also releases what was deleted meanwhile."""
        if session in self._mounts:
            self._active.discard(session)
            with suppress(OSError):
                self._reservations.set(session, self._most_on_host(session))

    def usage(self, session: str) -> Usage | None:
        """Return the usage that the file system reports; its own overhead (2 %) counts as used."""
        path = self._mounts.get(session)
        if path is None:
            return None
        disk = os.statvfs(path)
        used = (disk.f_blocks - disk.f_bavail) * disk.f_frsize
        return Usage(used, disk.f_blocks * disk.f_frsize, disk.f_files - disk.f_ffree, disk.f_files)

    def remove(self, session: str, path: str) -> None:
        """Unmount and delete the image, whatever it holds. A busy mount ends with its last user."""
        try:
            kernel.unmount(path)
        except OSError as error:
            if error.errno == errno.EBUSY:
                kernel.unmount(path, lazily=True)
            elif error.errno not in (errno.EINVAL, errno.ENOENT):  # not mounted, or does not exist
                raise
        with suppress(FileNotFoundError):
            os.rmdir(path)
        with suppress(FileNotFoundError):
            os.unlink(self._image(session))

    def forget(self, session: str) -> None:
        """Release the session's reservation."""
        self._mounts.pop(session, None)
        self._active.discard(session)
        with suppress(OSError):
            self._reservations.set(session, 0)

    def _image(self, session: str) -> str:
        return os.path.join(self._folder, f"{session}.ext4")

    def _mount(self, session: str, path: str) -> None:
        image = self._image(session)
        with suppress(FileExistsError):  # left by an earlier spare
            os.mkdir(path, 0o700)
        try:
            file = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                _copy(self._template, file)
                device, descriptor = loop_devices.attach(file)
            finally:
                os.close(file)
            try:
                kernel.mount(device, path, "ext4", _FLAGS, _OPTIONS)
            finally:
                os.close(descriptor)
            os.rmdir(os.path.join(path, "lost+found"))
        except BaseException:
            with suppress(OSError):
                self.remove(session, path)
            raise

    def _take_spare(self, session: str, path: str) -> bool:
        """Turn the spare into a session's image. Return False if there is none or it fails; then nothing is left."""
        spare, self._spare = self._spare, None
        self._spare_failed = False
        if spare is None:
            return False
        try:
            os.mkdir(path, 0o700)
            kernel.mount(self._spare_folder, path, flags=kernel.MS_MOVE)
            os.rename(self._image(spare), self._image(session))
        except OSError:
            for name, mounted in ((session, path), (spare, self._spare_folder)):
                with suppress(OSError):
                    self.remove(name, mounted)
            return False
        return True

    def _most_on_host(self, session: str) -> int:
        """Return the most bytes of the host's disk that the image can take while nothing new is written to it.

        That is more than it takes now: written data may still be in memory, with the inode tables that it needs.
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
    done = subprocess.run(command, capture_output=True, timeout=_MKFS_SECONDS, check=False)  # noqa: S603 (fixed command)
    if done.returncode:
        raise OSError(f"mke2fs failed: {done.stderr.decode(errors='replace').strip()[:500]}")


def _copy(template: str, target: int) -> None:
    """Copy a file's data and keep its holes; as a reflink where the file system supports it."""
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
