"""Linux system calls that Python 3.11 has no function for: namespaces, mounts, capabilities.

Uses the standard library only, because the shim imports it. Every function raises OSError with the call's name. The
numbers are those of <linux/sched.h>, <linux/mount.h>, <linux/prctl.h> and <linux/capability.h>, which are the same on
every architecture.

Rejected: a C extension (needs a compiler at installation); the programs `unshare`, `mount` and `setpriv` (six processes
per start, and errors only as text).
"""

from __future__ import annotations

import ctypes
import os

# Importing `typing` would cost every shim half a megabyte; type checkers treat this name as true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2

CAP_KILL, CAP_SYS_ADMIN = 5, 21
_CLOSE_RANGE, _CLOSE_RANGE_CLOEXEC = 436, 4
_LAST_DESCRIPTOR = 0xFFFFFFFF
_PR_SET_PDEATHSIG, _PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 23, 24, 38
_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP = 4, 8, 22
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522


def _call(name: str, *arguments: object) -> int:
    library = ctypes.CDLL(None, use_errno=True)
    result: int = getattr(library, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Move the calling thread into new namespaces (unshare(2))."""
    _call("unshare", flags)


def enter(descriptor: int, kind: int) -> None:
    """Move the calling thread into an existing namespace (setns(2))."""
    _call("setns", descriptor, kind)


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mount a file system (mount(2))."""
    try:
        _call("mount", source.encode(), target.encode(), kind and kind.encode(), flags, data and data.encode())
    except OSError as error:
        raise OSError(error.errno, f"mount of {target}: {os.strerror(error.errno or 0)}") from None


def pivot_root(new_root: str) -> None:
    """Make `new_root` the root of this mount namespace, and unmount the old root (pivot_root(2), its last example)."""
    os.chdir(new_root)
    library = ctypes.CDLL(None, use_errno=True)
    if library.pivot_root(b".", b".") < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"pivot_root: {os.strerror(number)}")
    _call("umount2", b".", _MNT_DETACH)
    os.chdir("/")


def close_on_exec_except(inherited: Iterable[int]) -> None:
    """Let the next program inherit only these descriptors (close_range(2), Linux 5.11)."""
    first = 0
    for descriptor in sorted(inherited):
        os.set_inheritable(descriptor, True)
        if descriptor > first:
            _close_on_exec(first, descriptor - 1)
        first = descriptor + 1
    _close_on_exec(first, _LAST_DESCRIPTOR)


def _close_on_exec(first: int, last: int) -> None:
    kind = ctypes.c_long
    _call("syscall", kind(_CLOSE_RANGE), kind(first), kind(last), kind(_CLOSE_RANGE_CLOEXEC))


def die_with_parent(number: int) -> None:
    """Let the kernel send this signal to the process when its parent ends."""
    _call("prctl", _PR_SET_PDEATHSIG, number, 0, 0, 0)


def set_no_new_privileges() -> None:
    """Forbid programs that this thread starts to gain privileges."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def keep_capabilities_over_setuid() -> None:
    """Preserve the permitted capabilities over the next change of user."""
    _call("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)


def filter_calls(program: bytes) -> None:
    """Install a seccomp filter, a packed `struct sock_fprog`, for the calling thread."""
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0)


def hide_memory() -> None:
    """Forbid processes of the same user to trace this process or to read its memory."""
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def drop_bounding_set() -> None:
    """Remove every capability from the set that this thread or its children can ever acquire."""
    capability = 0
    while True:
        try:
            held = _call("prctl", _PR_CAPBSET_READ, capability, 0, 0, 0)
        except OSError:
            return
        if held:
            _call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
        capability += 1


def keep_capabilities(*capabilities: int) -> None:
    """Drop every capability of the calling thread except these (capset(2))."""
    bits = sum(1 << capability for capability in capabilities)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    # Effective, permitted, inheritable; first the low words, then the high ones.
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    _call("capset", header, data)
