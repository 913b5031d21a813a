"""The sandbox that a shim and a template holder enter once they have started: no files, and few system calls.

The steps of `enter` and `filter_system_calls`:
- a mount namespace whose root is an empty, read-only file system, so only open descriptors lead to files;
- a separate uid and gid, and no groups;
- no capabilities except the given ones;
- a seccomp filter (seccomp(2), bpf(4)) that allows only the system calls that the program needs from then on. All
  others, such as `open`, `execve`, `clone`, `ptrace`, `mount` and `setns`, fail with EPERM. `kill` accepts one pid,
  and `socket` creates only TCP and UDP sockets.

Uses the standard library only, because the shim imports it. Filter and capabilities apply to the calling thread.

Rejected: a list of forbidden calls, as for sessions (the calls of these programs are known).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from hypercore_agents.compute.microvm import syscalls

UID_OFFSET = 10_000
"""A shim's uid is its QEMU's uid plus this offset."""
HOLDER_UID = 1_900_120_000
"""The uid of all template holders: the first one after the uids of shims."""

_ALLOW, _ERRNO, _KILL = 0x7FFF_0000, 0x0005_0000, 0x8000_0000
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_FAMILIES = (2, 10)
"""AF_INET, AF_INET6."""

# read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn ioctl pread64 pwrite64
# sched_yield mremap madvise nanosleep getpid connect accept sendto recvfrom sendmsg recvmsg shutdown getsockname
# getpeername setsockopt getsockopt exit wait4 fcntl ftruncate gettimeofday sigaltstack gettid futex restart_syscall
# clock_gettime clock_nanosleep exit_group epoll_ctl ppoll set_robust_list epoll_pwait accept4 getrandom rseq
_X86_64 = (0xC000_003E, {"kill": 62, "socket": 41}, (
    0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18,
    24, 25, 28, 35, 39, 42, 43, 44, 45, 46, 47, 48, 51,
    52, 54, 55, 60, 61, 72, 77, 96, 131, 186, 202, 219,
    228, 230, 231, 233, 271, 273, 281, 288, 318, 334,
    7, 232,  # poll epoll_wait, which other architectures do not have
))  # fmt: skip
_AARCH64 = (0xC000_00B7, {"kill": 129, "socket": 198}, (
    63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 29, 67, 68,
    124, 216, 233, 101, 172, 203, 202, 206, 207, 211, 212, 210, 204,
    205, 208, 209, 93, 260, 25, 46, 169, 132, 178, 98, 128,
    113, 115, 94, 21, 73, 99, 22, 242, 278, 293,
))  # fmt: skip
_TABLES = {"x86_64": _X86_64, "aarch64": _AARCH64}


def enter(place: str, uid: int, *capabilities: int) -> None:
    """Move this process to an empty root and another user, with only these capabilities.

    Call it before the process has threads. `place` is a directory to mount on. Raises OSError.
    """
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    syscalls.mount("none", place, "tmpfs", flags, "size=4k,mode=755")
    syscalls.pivot_root(place)
    syscalls.mount("none", "/", None, syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY | flags)
    syscalls.drop_bounding_set()
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    syscalls.keep_capabilities_over_setuid()
    os.setresuid(uid, uid, uid)
    syscalls.keep_capabilities(*capabilities)
    syscalls.set_no_new_privileges()


def filter_system_calls(*, may_kill: int | None = None) -> None:
    """Restrict the calling thread's system calls; `may_kill` is the only pid that it may kill. Raises OSError."""
    program = _program(os.uname().machine, may_kill)
    code = ctypes.create_string_buffer(program, len(program))
    syscalls.filter_calls(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))


def _program(machine: str, may_kill: int | None) -> bytes:
    if machine not in _TABLES:
        raise OSError(errno.ENOSYS, f"seccomp: no table of system calls for {machine}")
    architecture, special, allowed = _TABLES[machine]
    refuse, allow = (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ALLOW)
    # struct seccomp_data: nr at 0, arch at 4, args[0] at 16 (its low half first)
    lines = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for number in allowed:
        lines += [(_EQUAL, 0, 1, number), allow]
    lines += [(_EQUAL, 0, 5, special["socket"]), (_LOAD, 0, 0, 16)]
    lines += [(_EQUAL, 1, 0, _FAMILIES[0]), (_EQUAL, 0, 1, _FAMILIES[1]), allow, refuse]
    if may_kill is not None:
        lines += [(_EQUAL, 0, 3, special["kill"]), (_LOAD, 0, 0, 16), (_EQUAL, 0, 1, may_kill), allow]
    lines += [refuse]
    return b"".join(struct.pack("HBBI", *line) for line in lines)
