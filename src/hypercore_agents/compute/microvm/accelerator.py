"""KVM where it really works, TCG where it does not: found out by booting the image's own kernel.

`/dev/kvm` may exist, open, and even run a tiny guest, and still hang on a real kernel (nested virtualisation). So the
probe boots the real kernel with an initramfs that prints a marker, and gives it five seconds. The answer is kept per
boot of the host, kernel and QEMU: a probe that hangs is not repeated at every start.
"""

import hashlib
import json
import os
import re
import secrets
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from hypercore_agents.compute.microvm.image.images import Image
from hypercore_agents.compute.microvm.image.initramfs import probe_initramfs

QEMU = "qemu-system-x86_64"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PROBE_SECONDS = 5.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Accelerator:
    """What runs the guests' instructions, and in one sentence why."""

    name: Literal["kvm", "tcg"]
    reason: str


def accelerator(image: Image, cache: Path, *, device: Path = Path("/dev/kvm"), qemu: str = QEMU) -> Accelerator:
    """Return the accelerator for this image; blocking for up to five seconds the first time after the host's boot.

    `cache` is a folder for the answer. A QEMU that cannot be started counts as KVM that does not work.
    """
    if not device.exists():
        return Accelerator("tcg", f"{device} does not exist")
    if not os.access(device, os.R_OK | os.W_OK):
        return Accelerator("tcg", f"{device} may not be opened by this user")
    key = _key(image, qemu)
    kept = cache / "accelerator.json"
    try:
        answer = json.loads(kept.read_text())
        if answer.pop("key") == key:
            return Accelerator(**answer)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or another version's
    found = probe(image, qemu=qemu)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=cache, delete=False) as file:
        json.dump({"key": key, **asdict(found)}, file)
    Path(file.name).replace(kept)
    return found


def probe(image: Image, *, qemu: str = QEMU, kind: str = "kvm", seconds: float = _PROBE_SECONDS) -> Accelerator:
    """Boot the image's kernel under `kind` and say whether it came up in time."""
    marker = f"up-{secrets.token_hex(8)}"
    with tempfile.TemporaryDirectory(prefix="hypercore-probe-") as folder:
        initrd, serial = Path(folder) / "initrd", Path(folder) / "serial"
        initrd.write_bytes(probe_initramfs(image.busybox.read_bytes(), marker))
        serial.touch()
        try:
            process = subprocess.Popen(  # noqa: S603 - the program is the operator's, the arguments ours
                _command(qemu, kind, image, initrd, serial),
                env={"PATH": os.defpath},  # the manager's own has secrets
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            return Accelerator("tcg", f"{qemu} cannot be started ({error.strerror})")
        try:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                ended = process.poll() is not None
                if marker in serial.read_text(errors="replace"):
                    return Accelerator("kvm", "the probe booted the image's kernel under KVM")
                if ended:
                    return Accelerator("tcg", f"QEMU ended with status {process.returncode} in the probe of KVM")
                time.sleep(_POLL_SECONDS)
            return Accelerator("tcg", f"the image's kernel did not come up under KVM in {seconds:g} s")
        finally:
            process.kill()
            process.wait()


def _command(qemu: str, kind: str, image: Image, initrd: Path, serial: Path) -> list[str]:
    return [
        qemu,
        *("-M", "microvm,acpi=on,pcie=off,rtc=on", "-accel", kind, "-cpu", "host" if kind == "kvm" else "max"),
        *("-m", "256", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-serial", f"file:{serial}", "-kernel", str(image.kernel), "-initrd", str(initrd)),
        *("-append", f"console=ttyS0 quiet reboot=t panic=-1 {_clock()} tsc=reliable no_timer_check"),
    ]


def _clock() -> str:
    """Spare the kernel the calibration of its clock, which hangs at times under TCG; about right is enough here."""
    found = re.search(r"^cpu MHz\s*:\s*(\d+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"tsc_early_khz={int(found[1]) * 1000 if found else 2_000_000}"


def _key(image: Image, qemu: str) -> str:
    """Name what the answer depends on: this boot of the host, the kernel, QEMU."""
    boot = _BOOT_ID.read_text().strip()
    try:
        version = subprocess.run([qemu, "--version"], env={"PATH": os.defpath}, capture_output=True, check=False).stdout  # noqa: S603
    except OSError:
        version = b""
    kernel = str(image.manifest().get("files", {}).get("vmlinuz"))
    return hashlib.sha256(f"{boot}\0{kernel}\0".encode() + version).hexdigest()
