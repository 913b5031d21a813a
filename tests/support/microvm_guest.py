"""A tiny guest for tests of the microvm backend's host side: the image's kernel and busybox, and no Python.

It fulfils the contract of a real guest (`api.guest`: control and log port, disks, addresses) and boots in two or three
seconds. Its agent reads one shell command per connection on port 8080, and answers with the command's output.
"""

import stat
from pathlib import Path

from hypercore_agents.compute.microvm.image import Image
from hypercore_agents.compute.microvm.image.initramfs import Entry, archive
from hypercore_agents.compute.microvm.vm import GuestImage

_INIT = r"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
while read -r module; do insmod /modules/$module.ko; done < /modules/order
word() { sed -n "s/.*hypercore.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }
ip link set lo up; ip addr add $(word address) dev eth0; ip link set eth0 up; ip route add default via $(word router)
for p in /sys/class/virtio-ports/*; do ln -s /dev/${p##*/} /$(cat $p/name); done
for d in /sys/block/vd*; do [ "$(cat $d/serial)" = hypercore-scratch ] && disk=/dev/${d##*/}; done
mkdir -p /scratch; mount -t ext4 -o usrquota,prjquota $disk /scratch
exec 3<>/hypercore.control
mkfifo /say
while true; do cat /say >&3; done &
nc -ll -p 8080 -e /agent &
while ! netstat -tln | grep -q :8080; do usleep 10000; done
echo '{"waiting-for-identity": {"protocol": 1}}' >&3
while read -r line <&3; do
  case "$line" in
    *\"identity\"*)
      [ -e /silent ] && continue
      echo "$line" >/identity
      date -s @$(sed -n 's/.*"clock":\([0-9]*\).*/\1/p' /identity) >/dev/null
      hostname "$(sed -n 's/.*"hostname":"\([^"]*\)".*/\1/p' /identity)"
      echo '{"identified": {}}' >&3
      echo '{"ready": {}}' >&3 ;;
    *\"shutdown\"*)
      [ -e /deaf ] && continue
      sync
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
"""


def tiny_guest(image: Image, place: Path, *, hangs: bool = False) -> GuestImage:
    """Create the guest from an image's kernel and initramfs; the appended archive replaces files of the initramfs."""
    init = "#!/bin/busybox sh\nwhile true; do /bin/busybox sleep 100; done\n" if hangs else _INIT
    files = [
        Entry("init", stat.S_IFREG | 0o755, init.encode()),
        Entry("agent", stat.S_IFREG | 0o755, _AGENT.encode()),
    ]
    initrd = place / f"initrd-{'hangs' if hangs else 'tiny'}"
    initrd.write_bytes(image.initrd.read_bytes() + archive(files))
    return GuestImage(f"tiny-{image.image_id}-{hangs}", image.kernel, initrd, None)
