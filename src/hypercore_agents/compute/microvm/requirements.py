"""Checks what this host lacks for microVMs, with the remedy for each item. Changes nothing. Blocks."""

import os
import platform
import shutil
import sys
from pathlib import Path

QEMU = "qemu-system-x86_64"

# capabilities(7), by number: the shim and the backend need them until they drop them
_CAPABILITIES = {
    "CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SETPCAP": 8,
    "CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21, "CAP_MKNOD": 27,
}  # fmt: skip
_PROGRAMS = (
    (QEMU, "qemu-system-x86"),
    ("nft", "nftables"),
    ("mke2fs", "e2fsprogs"),
)
_SEARCHED = os.pathsep.join(("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"))


def find_program(name: str) -> Path | None:
    """Return the path of a system program, None if it is not installed."""
    found = shutil.which(name, path=_SEARCHED)
    return Path(found) if found else None


def missing() -> list[str]:
    """Return what is missing, one sentence each; empty if microVMs can run here."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return [f"microVMs need Linux on x86_64, this is {sys.platform} on {platform.machine()}"]
    lacking = []
    if os.geteuid() != 0:
        lacking.append("the manager is not root, which namespaces and network devices need; start it with sudo")
    else:
        held = _effective_capabilities()
        absent = [name for name, number in _CAPABILITIES.items() if not held >> number & 1]
        if absent:
            lacking.append(
                f"root lacks {', '.join(absent)} here; in a container, start it with --cap-add for each of them"
            )
    packages = [package for program, package in _PROGRAMS if find_program(program) is None]
    if packages:
        lacking.append(f"programs are missing: apt-get install -y {' '.join(packages)}")
    if not Path("/dev/net/tun").exists():
        lacking.append("/dev/net/tun is missing: modprobe tun, or give the container --device /dev/net/tun")
    try:
        import qemu.qmp  # noqa: F401
    except ModuleNotFoundError:
        lacking.append("the Python package qemu.qmp is missing: pip install 'hypercore-agents[microvm]'")
    return lacking


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0
