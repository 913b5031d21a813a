"""Loop devices: a file as a block device that goes away by itself with the last user. loop(4), Linux 5.8.

A device is attached with autoclear, so it lives exactly as long as it is mounted (or open): no step after a crash has
to find and detach it. Direct I/O keeps the file's pages from being cached twice; where the file system below has none,
the kernel falls back to its cache.
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
"""Another process may take the free device first."""


def attach(file: int) -> tuple[str, int]:
    """Attach an open file; return the device's path and a descriptor of it, to be closed once it is mounted.

    Raises OSError, with the device or the control file in its text.
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
