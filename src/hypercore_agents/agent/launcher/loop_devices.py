"""Loop devices: a file as a block device that detaches itself with its last user. loop(4), Linux 5.8.

A device is attached with autoclear, so it exists exactly while it is mounted or open: no cleanup is needed after a
crash. Direct I/O avoids caching the file's pages twice; where the file system below does not support it, the kernel
uses its cache.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

_CONTROL = "/dev/loop-control"
_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE = 0x4C82, 0x4C0A
_AUTOCLEAR, _DIRECT_IO = 4, 16
_BLOCK = 4096
_TRIES = 64
"""Another process may take the free device first, so attaching is retried."""


def attach(file: int) -> tuple[str, int]:
    """Attach an open file; return the device's path and a descriptor of it; close that once the device is mounted.

    Raises OSError; its message names the device or the control file.
    """
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            path = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, _configuration(file))
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise OSError(error.errno, f"{path}: {error.strerror}") from None
                continue
            return path, device
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, f"{_CONTROL}: every free device was taken by another process")


def _configuration(file: int) -> bytearray:
    """Return `struct loop_config`: file, block size, `struct loop_info64`, eight reserved words."""
    info = struct.pack("=5Q4I64s64s32s2Q", *[0] * 8, _AUTOCLEAR | _DIRECT_IO, b"", b"", b"", 0, 0)
    return bytearray(struct.pack("=2I", file, _BLOCK) + info + bytes(64))
