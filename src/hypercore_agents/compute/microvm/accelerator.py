"""Chooses between KVM and TCG (emulation) by booting the image's kernel.

`/dev/kvm` may exist, open and even run a tiny guest, and still hang on a real kernel (nested virtualisation). The probe
therefore boots the image's kernel with an initramfs that prints a marker, and waits up to five seconds for it. The
result is cached per host boot, kernel and QEMU version, so a probe that hangs is not repeated at every start.
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

from hypercore_agents.compute.microvm.image.built_image import Image
from hypercore_agents.compute.microvm.image.initramfs import probe_initramfs

QEMU = "qemu-system-x86_64"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PROBE_SECONDS = 5.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Accelerator:
    """What executes the guests' instructions, and the reason in one sentence."""

    name: Literal["kvm", "tcg"]
    reason: str


def accelerator(image: Image, cache: Path, *, device: Path = Path("/dev/kvm"), qemu: str = QEMU) -> Accelerator:
    """Return the accelerator for an image. Blocks for up to five seconds the first time after a boot of the host.

    `cache` is the folder for the cached result. If QEMU cannot be started, the answer is TCG.
    """
    if not device.exists():
        return Accelerator("tcg", f"{device} does not exist")
    if not os.access(device, os.R_OK | os.W_OK):
        return Accelerator("tcg", f"this user may not open {device}")
    key = _key(image, qemu)
    cached = cache / "accelerator.json"
    try:
        answer = json.loads(cached.read_text())
        if answer.pop("key") == key:
            return Accelerator(**answer)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent, or written by another version
    found = probe(image, qemu=qemu)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=cache, delete=False) as file:
        json.dump({"key": key, **asdict(found)}, file)
    Path(file.name).replace(cached)
    return found


def probe(image: Image, *, qemu: str = QEMU, kind: str = "kvm", seconds: float = _PROBE_SECONDS) -> Accelerator:
    """Boot the image's kernel under `kind`; return KVM if it boots within `seconds`, else TCG."""
    marker = f"up-{secrets.token_hex(8)}"
    with tempfile.TemporaryDirectory(prefix="hypercore-probe-") as folder:
        initrd, serial = Path(folder) / "initrd", Path(folder) / "serial"
        initrd.write_bytes(probe_initramfs(image.busybox.read_bytes(), marker))
        serial.touch()
        try:
            process = subprocess.Popen(  # noqa: S603 - the program is the operator's, the arguments are this module's
                _command(qemu, kind, image, initrd, serial),
                env={"PATH": os.defpath},  # the manager's environment has secrets
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
                    return Accelerator("tcg", f"QEMU exited with status {process.returncode} during the KVM probe")
                time.sleep(_POLL_SECONDS)
            return Accelerator("tcg", f"the image's kernel did not boot under KVM within {seconds:g} s")
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
    """Return the kernel parameter that skips the clock's calibration, which sometimes hangs under TCG.

    An approximate frequency is enough for the probe.
    """
    found = re.search(r"^cpu MHz\s*:\s*(\d+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"tsc_early_khz={int(found[1]) * 1000 if found else 2_000_000}"


def _key(image: Image, qemu: str) -> str:
    """Return a name for all that the result depends on: the boot of the host, the kernel and QEMU."""
    boot = _BOOT_ID.read_text().strip()
    try:
        version = subprocess.run([qemu, "--version"], env={"PATH": os.defpath}, capture_output=True, check=False).stdout  # noqa: S603
    except OSError:
        version = b""
    kernel = str(image.manifest().get("files", {}).get("vmlinuz"))
    return hashlib.sha256(f"{boot}\0{kernel}\0".encode() + version).hexdigest()
