"""The guest's machine: mounts, network, sysctls, power. Runs in pid 1, as root; standard library only.

Invariants: the root is read-only; only the scratch disk (whose size the host limits) and small tmpfs are writable.
After `harden`, no module can be loaded and no user namespace created, and capabilities that the guest does not need are
permanently removed from the bounding set.
"""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hypercore_agents.api.guest import SCRATCH_SERIAL, BootParameters

STATE = Path("/var/lib/agent")
AGENT_UID = 1000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_NOATIME = 1, 2, 4, 8, 1024
_PR_CAPBSET_DROP = 24
_RB_AUTOBOOT = 0x01234567
_TMPFS = (
    ("/run", "mode=755,size=16m,nr_inodes=4k", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC),
    ("/tmp", "mode=1777,size=64m,nr_inodes=16k", _MS_NOSUID | _MS_NODEV),  # noqa: S108
    ("/var/tmp", "mode=1777,size=16m,nr_inodes=4k", _MS_NOSUID | _MS_NODEV),  # noqa: S108
    ("/dev/shm", "mode=1777,size=64m,nr_inodes=4k", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC),  # noqa: S108
)
_SYSCTLS = (
    ("net/ipv6/conf/all/disable_ipv6", "1"),
    ("net/ipv6/conf/default/disable_ipv6", "1"),
    ("kernel/dmesg_restrict", "1"),
    ("kernel/kptr_restrict", "2"),
    ("kernel/unprivileged_bpf_disabled", "1"),
    ("kernel/yama/ptrace_scope", "2"),
    ("kernel/modules_disabled", "1"),
    ("user/max_user_namespaces", "0"),
    ("fs/protected_hardlinks", "1"),
    ("fs/protected_symlinks", "1"),
    ("fs/suid_dumpable", "0"),
)
# capabilities(7) that neither pid 1 nor the launcher needs
_DROPPED_CAPABILITIES = {
    "linux_immutable": 9, "ipc_lock": 14, "ipc_owner": 15, "sys_module": 16, "sys_rawio": 17, "sys_pacct": 20,
    "sys_tty_config": 26, "lease": 28, "audit_write": 29, "audit_control": 30, "mac_override": 32, "mac_admin": 33,
    "syslog": 34, "wake_alarm": 35, "block_suspend": 36, "audit_read": 37, "perfmon": 38, "bpf": 39,
    "checkpoint_restore": 40,
}  # fmt: skip
_LEAST_SESSION_MB = 256
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class SessionLimits:
    """The limits of one session, in MB."""

    memory_mb: int
    disk_mb: int
    scratch_mb: int


def session_limits() -> SessionLimits:
    """Return limits such that one session cannot exhaust the machine for the server and other sessions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    disk = os.statvfs(STATE)
    return SessionLimits(
        memory_mb=max(_LEAST_SESSION_MB, min(2048, memory // 2)),
        disk_mb=max(64, (disk.f_frsize * disk.f_blocks >> 20) // 4),
        scratch_mb=max(16, min(128, memory // 16)),
    )


class MachineError(Exception):
    """The machine lacks something that an agent needs; the message names it."""


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """Mount, by mount(2). Raises MachineError."""
    if _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()) != 0:
        raise MachineError(f"cannot mount {kind or source} at {target}: {os.strerror(ctypes.get_errno())}")


def set_up_mounts() -> None:
    """Mount the writable file systems. The initramfs has mounted /proc, /sys and /dev."""
    for folder in ("/dev/shm", "/dev/pts"):  # noqa: S108 - a mount point in devtmpfs
        Path(folder).mkdir(exist_ok=True)
    for target, options, flags in _TMPFS:
        mount("tmpfs", target, "tmpfs", flags, options)
    mount("devpts", "/dev/pts", "devpts", _MS_NOSUID | _MS_NOEXEC, "mode=620,ptmxmode=666,newinstance")
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    mount(str(_scratch_disk()), str(STATE), "ext4", _MS_NOSUID | _MS_NODEV | _MS_NOATIME, "usrquota,prjquota")


def _scratch_disk() -> Path:
    for serial in Path("/sys/block").glob("vd*/serial"):
        if serial.read_text().strip() == SCRATCH_SERIAL:
            return Path("/dev") / serial.parent.name
    raise MachineError(f"no disk has the serial {SCRATCH_SERIAL}")


def set_up_network(parameters: BootParameters) -> None:
    """Set the address of eth0 and the default route. Raises MachineError."""
    commands = (
        "link set lo up\n"
        f"address replace {parameters.address} dev eth0\n"
        "link set eth0 up\n"
        f"route replace default via {parameters.router} onlink dev eth0\n"
    )
    done = subprocess.run(["/sbin/ip", "-batch", "-"], input=commands.encode(), capture_output=True, check=False)
    if done.returncode != 0:
        raise MachineError(f"cannot set up the network: {done.stderr.decode(errors='replace').strip()}")


def harden() -> None:
    """Set sysctls and permanently drop capabilities, also for the children of pid 1."""
    for name, value in _SYSCTLS:
        path = Path("/proc/sys") / name
        if path.exists():
            path.write_text(value)
    for number in _DROPPED_CAPABILITIES.values():
        _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)


def protect_server_from_oom() -> None:
    """Make the kernel kill sessions' processes, not the server, when memory runs out (proc(5), oom_score_adj)."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process may have ended
            if process.stat().st_uid == AGENT_UID:
                (process / "oom_score_adj").write_text("-900")


def port_device(name: str) -> Path | None:
    """Return the device of a virtio-serial port, None if the machine has no such port."""
    for path, port in _ports():
        if port == name:
            return path
    return None


def _ports() -> Iterator[tuple[Path, str]]:
    for name in Path("/sys/class/virtio-ports").glob("vport*/name"):
        yield Path("/dev") / name.parent.name, name.read_text().strip()


def power_off() -> None:
    """Write dirty pages to the scratch disk and end the machine: QEMU, started with -no-reboot, exits."""
    os.sync()
    _libc.reboot(_RB_AUTOBOOT)
