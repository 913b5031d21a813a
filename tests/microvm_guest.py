"""A tiny guest for tests of the microvm backend's host side: Linux, busybox, and an agent that does what a test says.

It keeps the real image's contract (control port, disks, addresses) and boots in about two seconds. Its agent answers
one line of JSON-free text per connection on port 8080: a shell command; what the command prints comes back.
"""

import io
import lzma
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

MODULES = (
    "virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "virtio_console", "failover", "net_failover", "virtio_net",
    "rng-core", "virtio-rng", "quota_tree", "quota_v2",
)  # fmt: skip
BUSYBOX = Path("/bin/busybox")

_INIT = r"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for m in __MODULES__; do [ -e /modules/$m.ko ] && insmod /modules/$m.ko; done
ip link set lo up
word() { sed -n "s/.*$1=\([^ ]*\).*/\1/p" /proc/cmdline; }
ip addr add $(word hypercore.address) dev eth0; ip link set eth0 up
for p in /sys/class/virtio-ports/*; do [ "$(cat $p/name)" = hypercore.control ] && port=/dev/${p##*/}; done
for p in /sys/class/virtio-ports/*; do [ "$(cat $p/name)" = hypercore.log ] && log=/dev/${p##*/}; done
ln -s $log /log
ln -s $port /control
exec 3<>$port
nc -ll -p 8080 -e /agent &
while ! netstat -tln | grep -q :8080; do usleep 10000; done
echo '{"waiting-for-identity": {"protocol": 1}}' >&3
while read -r line <&3; do
  case "$line" in
    *\"identity\"*)
      echo "$line" >/identity
      field() { sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p" /identity; }
      hostname "$(field hostname)"
      mkdir -p /scratch; mount -t ext4 -o usrquota,prjquota $(ls -r /dev/vd? | head -n 1) /scratch
      echo '{"identified": {}}' >&3
      echo '{"ready": {}}' >&3 ;;
    *\"shutdown\"*)
      [ -e /deaf ] && continue
      echo '{"exited": {"status": 0}}' >&3
      poweroff -f ;;
  esac
done
poweroff -f
"""

_AGENT = r"""#!/bin/busybox sh
export PATH=/bin
read -r order
eval "$order" 2>&1
echo "status $?"
"""


@dataclass(frozen=True)
class TinyGuest:
    """Kernel and initramfs."""

    kernel: Path
    initrd: Path


def build_tiny_guest(kernel: Path, modules: Path, place: Path) -> TinyGuest:
    """Make the guest in `place` from a Debian kernel and its modules' folder (/lib/modules/VERSION)."""
    root = place / "root"
    for folder in ("bin", "proc", "sys", "dev", "modules"):
        (root / folder).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    found = {path.name.split(".ko")[0].replace("-", "_"): path for path in modules.rglob("*.ko*")}
    for name in MODULES:
        path = found.get(name.replace("-", "_"))
        if path is not None:
            content = path.read_bytes()
            if path.suffix == ".xz":
                content = lzma.decompress(content)
            (root / f"modules/{name}.ko").write_bytes(content)
    for name, text in (("init", _INIT.replace("__MODULES__", " ".join(MODULES))), ("agent", _AGENT)):
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    initrd = place / "initrd"
    initrd.write_bytes(cpio(root))
    return TinyGuest(kernel, initrd)


def cpio(root: Path) -> bytes:
    """Return a folder as an initramfs archive ("newc", the kernel's buffer-format.rst)."""
    archive = io.BytesIO()
    paths = sorted(root.rglob("*"))
    for number, path in enumerate([*paths, None], 1):
        name = str(path.relative_to(root)) if path else "TRAILER!!!"
        mode, content = 0, b""
        if path is not None:
            mode = path.lstat().st_mode
            content = path.read_bytes() if stat.S_ISREG(mode) else b""
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        archive.write(b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0")
        archive.write(b"\0" * (-archive.tell() % 4))
        archive.write(content)
        archive.write(b"\0" * (-archive.tell() % 4))
    return subprocess.run(["gzip", "-1"], input=archive.getvalue(), capture_output=True, check=True).stdout
