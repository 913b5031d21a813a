"""The seccomp filter of sessions: system calls that no process of a session may use (seccomp(2), bpf(4)).

All child processes inherit the filter. Namespaces and users isolate sessions; the filter removes the parts of the
kernel through which these could be attacked, and the calls by which one process of a session could act as another: new
namespaces (a user namespace would give capabilities in it), mounts, tracing and reading other processes' memory and
descriptors, keys, BPF, performance counters, kernel modules, io_uring, and sockets that no network namespace contains
(vsock, for example, reaches a virtual machine's host). Each returns EPERM. `clone3`, whose flags a filter cannot read,
returns ENOSYS, and every C library then uses `clone`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_ALLOW, _ERRNO, _KILL = 0x7FFF_0000, 0x0005_0000, 0x8000_0000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NEW_NAMESPACES = 0x7E02_0080
"""CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET,TIME}."""

_FAMILIES = (1, 2, 10, 16)
"""AF_UNIX, AF_INET, AF_INET6, AF_NETLINK."""

_X86_64 = (0xC000_003E, {"clone": 56, "unshare": 272, "clone3": 435, "socket": 41}, (
    101, 310, 311, 438,  # ptrace process_vm_readv process_vm_writev pidfd_getfd
    165, 166, 155, 428, 429, 430, 431, 432, 433, 442,  # mount umount2 pivot_root and the newer calls for mounts
    308, 161,  # setns chroot
    248, 249, 250, 298, 321, 323,  # add_key request_key keyctl perf_event_open bpf userfaultfd
    175, 176, 313, 246, 320, 169, 163, 167, 168,  # modules kexec reboot acct swap
    425, 426, 427, 304,  # io_uring open_by_handle_at
))  # fmt: skip
_AARCH64 = (0xC000_00B7, {"clone": 220, "unshare": 97, "clone3": 435, "socket": 198}, (
    117, 270, 271, 438,
    40, 39, 41, 428, 429, 430, 431, 432, 433, 442,
    268, 51,
    217, 218, 219, 241, 280, 282,
    105, 106, 273, 104, 294, 142, 89, 224, 225,
    425, 426, 427, 265,
))  # fmt: skip
_TABLES = {"x86_64": _X86_64, "aarch64": _AARCH64}


def install() -> None:
    """Filter this process and its future children. Needs no-new-privileges. Raises OSError."""
    program = _program(os.uname().machine)
    code = ctypes.create_string_buffer(program, len(program))
    filter_ = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, filter_, 0, 0) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def _program(machine: str) -> bytes:
    if machine not in _TABLES:
        raise OSError(errno.ENOSYS, f"seccomp: no table of system calls for {machine}")
    architecture, special, refused = _TABLES[machine]
    refuse = _ERRNO | errno.EPERM
    # struct seccomp_data: nr at 0, arch at 4, args[0] at 16 (its low half first)
    lines = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
    ]
    if machine == "x86_64":
        # The x32 numbers are aliases of the same calls.
        lines += [(_AT_LEAST, 0, 1, 0x4000_0000), (_RETURN, 0, 0, refuse)]
    for number in refused:
        lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, refuse)]
    lines += [(_EQUAL, 0, 1, special["clone3"]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    lines += [
        (_EQUAL, 0, 7, special["socket"]),
        (_LOAD, 0, 0, 16),
        *((_EQUAL, 4 - place, 0, family) for place, family in enumerate(_FAMILIES)),
        (_RETURN, 0, 0, refuse),
        (_RETURN, 0, 0, _ALLOW),
        (_EQUAL, 1, 0, special["clone"]),
        (_EQUAL, 0, 3, special["unshare"]),
        (_LOAD, 0, 0, 16),
        (_ANY_BIT, 0, 1, _NEW_NAMESPACES),
        (_RETURN, 0, 0, refuse),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *line) for line in lines)
