"""QEMU's command line, as a pure function of the machine's description.

The devices of a clone must be exactly those of its template, so this module describes both. `{name}` in an argument
stands for the number of an open descriptor (`shim_protocol.Plan`): QEMU opens no path of the host except its own files.

The reasons for unusual options:
- `acpi=on` (without it no disk is found), `pcie=off` (saves a second), `rtc=on` (the guest's clock at boot).
- `tsc_early_khz`: without it, one boot in three under TCG hung at "Unable to calibrate against PIT".
- `guest_announce=off`: no other machine is on a clone's network, and its kernel would announce its address five times.
- No balloon and no free page reporting: in a clone they would punch holes into the template's memory.
- Memory in up to 128 blocks, each a NUMA node (the only way to give a machine several blocks; the guest sees one node,
  because this machine has no SRAT). A block that the template never touched is anonymous in a clone, so no memory is
  charged twice (ADR 0031).
- `-sandbox`: QEMU's seccomp filter, which denies starting programs and regaining privileges.
- Two virtio-serial ports (`api.guest`). One carries the identity, the secret and the exit status, which never appear on
  the kernel's command line or in the serial log; the other carries the agent's output.
"""

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hypercore_agents.api.guest import CONTROL_PORT, LOG_PORT, ROOT_SERIAL, SCRATCH_SERIAL, BootParameters
from hypercore_agents.compute.microvm import network

GATEWAY_URL = f"http://{network.HOST}:{network.GATEWAY_PORT}"
"""The gateway's URL in every VM."""

_MIN_BLOCK_MB = 8
_MAX_BLOCKS = 128
"""QEMU's limit on NUMA nodes (MAX_NODES)."""

_BOOT = BootParameters(f"{network.GUEST}/{network.PREFIX}", network.HOST, GATEWAY_URL)


@dataclass(frozen=True)
class Machine:
    """The hardware of a VM. `tsc_khz` is the frequency of the host's time stamp counter, needed under TCG."""

    program: Path
    accelerator: Literal["kvm", "tcg"]
    cores: int
    memory_mb: int
    tsc_khz: int | None
    has_root: bool = True

    def blocks(self) -> dict[str, int]:
        """Return the blocks of a template's memory: the name of each block's descriptor and its size in MB."""
        size = max(_MIN_BLOCK_MB, -(-self.memory_mb // _MAX_BLOCKS))
        starts = range(0, self.memory_mb, size)
        return {f"ram{number}": min(size, self.memory_mb - start) for number, start in enumerate(starts)}

    def arguments(self, memory: Literal["own", "template", "clone"], shared: Container[str] = ()) -> list[str]:
        """Return QEMU's arguments.

        `memory`: "own" memory is anonymous. In a "template" each of the `blocks` is a memfd shared with QEMU, which
        holds the snapshot. A "clone" maps the template's blocks in `shared` copy on write, its other blocks are
        anonymous, and the VM waits for its state (`migrate-incoming`).
        """
        accelerator = "kvm" if self.accelerator == "kvm" else "tcg,thread=multi,tb-size=128"
        arguments = [
            str(self.program),
            *("-name", "hypercore-agent", "-M", "microvm,acpi=on,pcie=off,rtc=on", "-accel", accelerator),
            *("-cpu", "host" if self.accelerator == "kvm" else "max"),
            *("-smp", str(self.cores), "-m", f"{self.memory_mb}M"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
            *("-chardev", "socket,id=console,fd={console}", "-serial", "chardev:console"),
            *("-chardev", "socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=control"),
            *("-kernel", "/proc/self/fd/{kernel}", "-initrd", "/proc/self/fd/{initrd}"),
            *("-append", self.kernel_line()),
        ]
        if memory != "own":
            for name, size_mb in self.blocks().items():
                backend = f"memory-backend-ram,id={name},size={size_mb}M"
                if memory == "template" or name in shared:
                    share = "on" if memory == "template" else "off"
                    path = f"/proc/self/fd/{{{name}}}"
                    backend = f"memory-backend-file,id={name},size={size_mb}M,mem-path={path},share={share}"
                arguments += ["-object", backend, "-numa", f"node,memdev={name}"]
        if self.has_root:
            arguments += _disk("root", ROOT_SERIAL, "on")
        arguments += _disk("scratch", SCRATCH_SERIAL, "off")
        arguments += [
            *("-netdev", "tap,id=network,fd={tap}"),
            *("-device", f"virtio-net-device,netdev=network,mac={network.MAC},guest_announce=off"),
            *("-device", "virtio-serial-device,max_ports=3"),
            *("-chardev", "socket,id=control,fd={control}", "-chardev", "socket,id=log,fd={log}"),
            *("-device", f"virtserialport,chardev=control,name={CONTROL_PORT},nr=1"),
            *("-device", f"virtserialport,chardev=log,name={LOG_PORT},nr=2"),
            *("-object", "rng-builtin,id=entropy", "-device", "virtio-rng-device,rng=entropy"),
        ]
        return arguments if memory != "clone" else [*arguments, "-incoming", "defer"]

    def kernel_line(self) -> str:
        """Return the kernel's command line, which has no secret and is the same for all VMs of a size."""
        clock = [f"tsc_early_khz={self.tsc_khz}", "tsc=reliable", "no_timer_check"] if self.tsc_khz else []
        return " ".join(
            [
                *("console=ttyS0", "quiet", "reboot=t", "panic=-1", "random.trust_cpu=on", *clock),
                _BOOT.command_line(),
            ]
        )


def _disk(name: str, serial: str, read_only: str) -> list[str]:
    drive = f"id={name},file=/proc/self/fd/{{{name}}},format=raw,if=none,readonly={read_only},file.locking=off"
    return ["-drive", drive, "-device", f"virtio-blk-device,drive={name},serial={serial}"]
