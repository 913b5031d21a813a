"""System calls that Python 3.11's standard library lacks. Each raises OSError with the name of the call."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x0002_0000, 0x0400_0000, 0x0800_0000
CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWCGROUP = 0x2000_0000, 0x4000_0000, 0x0200_0000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_NOATIME, MS_MOVE, MS_REC, MS_PRIVATE, MS_SLAVE = 1024, 8192, 16384, 1 << 18, 1 << 19

_MNT_DETACH = 2
_AT_EMPTY_PATH, _AT_RECURSIVE = 0x1000, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV, _MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_MOUNT_SETATTR = 442
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_READ, _PR_CAPBSET_DROP = 1, 4, 23, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_PR_SET_KEEPCAPS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 8, 47, 2
_CAP_DAC_READ_SEARCH, _CAPABILITY_VERSION = 2, 0x2008_0522
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)


def _checked(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """unshare(2)."""
    _checked(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    encoded = [os.fsencode(text) for text in (source, target, kind)]
    _checked(_libc.mount(*encoded, flags, os.fsencode(options)), f"mount {target}")


def enter_mount_namespace() -> None:
    """Enter a new mount namespace: it receives the host's mounts; its own stay inside and end with the process."""
    unshare(CLONE_NEWNS)
    mount("none", "/", flags=MS_REC | MS_SLAVE)


def unmount(target: str, *, lazily: bool = False) -> None:
    """umount2(2). `lazily`: detach now, unmount when its last user ends."""
    _checked(_libc.umount2(os.fsencode(target), _MNT_DETACH if lazily else 0), f"umount {target}")


def bind(source: str, target: str, *, writable: bool = False, executable: bool = False) -> None:
    """Bind a tree and the mounts in it, without set-user-id and devices. mount_setattr(2), Linux 5.12.

    `executable`: allow programs in it to run even if its file system is mounted noexec.
    """
    mount(source, target, flags=MS_BIND | MS_REC)
    attributes = _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | (0 if writable else _MOUNT_ATTR_RDONLY)
    wanted = struct.pack("=QQQQ", attributes, _MOUNT_ATTR_NOEXEC if executable else 0, 0, 0)
    result = _libc.syscall(_SYS_MOUNT_SETATTR, -100, os.fsencode(target), _AT_RECURSIVE, wanted, len(wanted))
    _checked(result, f"mount_setattr {target}")


def enter_root(path: str) -> None:
    """Make a mount point this process's root and detach everything outside of it. pivot_root(2)."""
    number = _SYS_PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(f"pivot_root: unknown system call number on {os.uname().machine}")
    os.chdir(path)
    _checked(_libc.syscall(number, b".", b"."), "pivot_root")
    _checked(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")


def bring_loopback_up() -> None:
    """Set the loopback device of this network namespace up. netdevice(7)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        request = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sh22x", b"lo", 0))
        flags = struct.unpack_from("16sh", request)[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))


def prctl(option: int, value: int = 0) -> int:
    """prctl(2)."""
    return _checked(_libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(signal_number: int) -> None:
    """Receive this signal when the parent dies. Call it after a change of user, which clears it."""
    prctl(_PR_SET_PDEATHSIG, signal_number)


def hide_memory() -> None:
    """Prevent processes of the same user from tracing this one or reading its /proc files."""
    prctl(_PR_SET_DUMPABLE, 0)


def set_command_line(text: str) -> None:
    """Show this text instead of this process's arguments. proc(5), `stat`: arg_start, arg_end."""
    with open("/proc/self/stat") as file:
        start, end = (int(field) for field in file.read().rpartition(")")[2].split()[45:47])
    shown = text.encode()[: end - start - 1]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, shown, len(shown))


def become_user(uid: int, *, reads_all: bool = False) -> None:
    """Become a user without groups and capabilities, for good.

    `reads_all`: keep CAP_DAC_READ_SEARCH, also across exec, if this process has it. capabilities(7).
    """
    capability = 0
    while True:
        try:
            held = prctl(_PR_CAPBSET_READ, capability)
        except OSError:
            break
        if held and not (reads_all and capability == _CAP_DAC_READ_SEARCH):
            prctl(_PR_CAPBSET_DROP, capability)
        reads_all = reads_all and (capability != _CAP_DAC_READ_SEARCH or held > 0)
        capability += 1
    if reads_all:
        prctl(_PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if reads_all:
        _keep_only(_CAP_DAC_READ_SEARCH)
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _keep_only(capability: int) -> None:
    """Keep this capability and no other, also in executed programs. capset(2)."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    bits = 1 << capability
    _checked(_libc.capset(header, struct.pack("=6I", bits, bits, bits, 0, 0, 0)), "capset")
    _checked(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability, 0, 0), "prctl ambient")


def close_all_but(keep: set[int]) -> None:
    """Close every descriptor that is not in `keep`."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                continue
