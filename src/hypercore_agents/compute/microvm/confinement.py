"""Confines QEMU to the little that it needs on the host, in case a guest ever breaks out into it.

The steps of `confine`, in the forked child that becomes QEMU:
- control groups limit memory, CPU and processes;
- new mount, IPC and UTS namespaces (the shim creates the network and pid namespaces), with a root that has `/usr` and
  the loader's files, read-only, a `/proc` of the pid namespace, and three devices. No file of the platform or of other
  VMs has a path in it: disks, memory, TAP device and sockets are inherited as open descriptors;
- a separate user, no groups, no capability in any set, and no new privileges;
- QEMU adds its own seccomp filter (`machine`).

Uses the standard library only, because the shim imports it. Raises OSError with the step that failed: a VM that cannot
be confined does not start.

Rejected: `setpriv`, `unshare` and Firecracker's jailer (further programs to install, and the first two do not change
the root); a copied root (hundreds of libraries per VM).
"""

from __future__ import annotations

import os
import resource
import signal

from hypercore_agents.compute.host.shims import write_where_possible
from hypercore_agents.compute.microvm import syscalls

_VISIBLE = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
_DEVICES = ("/dev/null", "/dev/urandom")
_KVM = "/dev/kvm"
_OPEN_FILES = 1024


def join_groups(groups: list[str]) -> None:
    """Move this process into control groups."""
    for group in groups:
        with open(os.path.join(group, "cgroup.procs"), "w") as file:
            file.write("0")


def confine(*, place: str, uid: int, groups: list[str], kvm: bool, go: int) -> None:
    """Confine this process, which must be the first of its pid namespace. `place` is a directory to mount on.

    `go` is a pipe from the parent, which closes when the parent dies. Raises OSError.
    """
    join_groups(groups)
    write_where_possible("/proc/self/oom_score_adj", "500")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS)
    _change_root(place, [*_DEVICES, *([_KVM] if kvm else [])])
    syscalls.drop_bounding_set()
    os.setgroups([os.stat(_KVM).st_gid] if kvm else [])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    syscalls.keep_capabilities()
    syscalls.set_no_new_privileges()
    # Set after the change of user, which clears it. The parent may have died before it was set, so check the pipe.
    syscalls.die_with_parent(signal.SIGKILL)
    if _is_closed(go):
        raise OSError("the shim is gone")
    os.umask(0o077)


def _change_root(place: str, devices: list[str]) -> None:
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("tmpfs", place, "tmpfs", syscalls.MS_NOSUID, "size=256k,mode=755")
    for path in _VISIBLE:
        if os.path.islink(path):
            os.makedirs(os.path.dirname(place + path), exist_ok=True)
            os.symlink(os.readlink(path), place + path)
        elif os.path.exists(path):
            _bind_read_only(path, place + path, flags)
    for device in devices:
        _bind_read_only(device, place + device, syscalls.MS_NOSUID)
    os.makedirs(place + "/proc", exist_ok=True)
    syscalls.mount("proc", place + "/proc", "proc", flags | syscalls.MS_NOEXEC)
    syscalls.pivot_root(place)
    syscalls.mount("none", "/", None, syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY | syscalls.MS_NOSUID)


def _bind_read_only(path: str, target: str, flags: int) -> None:
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o444))
    syscalls.mount(path, target, None, syscalls.MS_BIND)
    syscalls.mount("none", target, None, syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY | flags)


def _is_closed(descriptor: int) -> bool:
    os.set_blocking(descriptor, False)
    try:
        return os.read(descriptor, 1) == b""
    except BlockingIOError:
        return False
