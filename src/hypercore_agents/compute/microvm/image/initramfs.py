"""The initramfs: busybox, a few kernel modules, and a script that mounts the root and starts pid 1.

This module writes the cpio archive ("newc", cpio(5)) itself: it takes a few lines, gives the same bytes for the same
input, and needs no further program on the host. The archive is not compressed: under TCG, decompressing costs more than
reading.
"""

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hypercore_agents.api.guest import ROOT_SERIAL

_SCRIPT = """#!/bin/busybox sh
# Errors end this script, which panics the kernel and ends the VM: fail closed.
set -e
/bin/busybox mount -t proc -o nosuid,nodev,noexec proc /proc
/bin/busybox mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
/bin/busybox mount -t devtmpfs -o nosuid,noexec,mode=755 devtmpfs /dev
while read -r module; do /bin/busybox insmod "/modules/$module.ko"; done < /modules/order
root=
for serial in /sys/block/vd*/serial; do
  read -r name < "$serial" || :
  if [ "$name" = @ROOT_SERIAL@ ]; then root=${serial#/sys/block/}; root=${root%/serial}; fi
done
/bin/busybox mount -t squashfs -o ro,nodev "/dev/$root" /root
for folder in proc sys dev; do /bin/busybox mount -o move "/$folder" "/root/$folder"; done
exec /bin/busybox switch_root /root /usr/bin/python3 -I -m hypercore_agents.agent.guest
"""
_PROBE = """#!/bin/busybox sh
/bin/busybox echo @MARKER@ > /dev/console
/bin/busybox reboot -f
"""


@dataclass(frozen=True)
class Entry:
    """A file, folder or device node of an archive."""

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def initramfs(busybox: bytes, modules: Iterable[tuple[str, bytes]]) -> bytes:
    """Return the archive that boots an image; `modules` are loaded in the given order."""
    loaded = list(modules)
    order = "".join(f"{name}\n" for name, _ in loaded).encode()
    script = _SCRIPT.replace("@ROOT_SERIAL@", ROOT_SERIAL).encode()
    return archive(
        [
            *_skeleton(busybox, ("proc", "sys", "root", "modules")),
            Entry("modules/order", stat.S_IFREG | 0o644, order),
            *(Entry(f"modules/{name}.ko", stat.S_IFREG | 0o644, content) for name, content in loaded),
            Entry("init", stat.S_IFREG | 0o755, script),
        ]
    )


def probe_initramfs(busybox: bytes, marker: str) -> bytes:
    """Return an archive whose init prints `marker` on the console and restarts the machine."""
    script = _PROBE.replace("@MARKER@", marker).encode()
    return archive([*_skeleton(busybox, ()), Entry("init", stat.S_IFREG | 0o755, script)])


def _skeleton(busybox: bytes, folders: Iterable[str]) -> list[Entry]:
    return [
        *(Entry(name, stat.S_IFDIR | 0o755) for name in ("bin", "dev", *folders)),
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        Entry("bin/busybox", stat.S_IFREG | 0o755, busybox),
    ]


def archive(entries: Iterable[Entry]) -> bytes:
    """Return a cpio archive in the kernel's format (newc)."""
    parts = []
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name = entry.name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device of the archive, device number, name length, checksum
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, *entry.device, len(name), 0)
        header = "070701" + "".join(f"{value:08X}" for value in fields)
        head = header.encode() + name
        parts += [head, bytes(-len(head) % 4), entry.content, bytes(-len(entry.content) % 4)]
    return b"".join(parts)


def read_modules(root: Path, names: Iterable[str]) -> list[tuple[str, bytes]]:
    """Return kernel modules of an unpacked kernel package. Raises FileNotFoundError with the name of a missing one."""
    found = []
    for name in names:
        path = next(root.glob(f"lib/modules/*/kernel/**/{name}.ko"), None)
        if path is None:
            raise FileNotFoundError(f"the kernel has no module {name}")
        found.append((name, path.read_bytes()))
    return found
