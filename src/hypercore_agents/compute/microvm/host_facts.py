"""Reads the facts about this host that VMs depend on: processor, memory, QEMU, clock. Blocks; read once."""

import ctypes
import mmap
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.host import capacity

_READ_TSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
"""rdtsc; shl rdx, 32; or rax, rdx; ret"""
_MEASURE_SECONDS = 0.05


@dataclass(frozen=True)
class HostFacts:
    """Processor, memory, QEMU version and clock frequency of this host."""

    cores: int
    memory_mb: int
    cpu_model: str
    qemu_version: str
    tsc_khz: int


def read_facts(qemu: Path) -> HostFacts:
    """Return the facts about this host. Raises SandboxError if QEMU does not run."""
    try:
        version = subprocess.run(  # noqa: S603
            [str(qemu), "--version"], env={"PATH": os.defpath}, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(f"{qemu} does not run: {error}") from error
    return HostFacts(
        cores=capacity.cores(),
        memory_mb=capacity.memory_mb(),
        cpu_model=cpu_model(Path("/proc/cpuinfo").read_text()),
        qemu_version=version.stdout.partition("\n")[0],
        tsc_khz=tsc_khz(),
    )


def cpu_model(cpuinfo: str) -> str:
    """Return what distinguishes this processor from others: model, stepping and features (`/proc/cpuinfo`)."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
    first = dict(re.findall(r"^(.+?)\s*:\s*(.*)$", cpuinfo.partition("\n\n")[0], re.MULTILINE))
    return "; ".join(first.get(name, "") for name in wanted)


def tsc_khz() -> int:
    """Return the frequency of the time stamp counter, measured against the kernel's clock.

    The kernel does not export it. "cpu MHz" in `/proc/cpuinfo`, which is used where executable memory is forbidden, is
    a different frequency on processors with a variable clock.
    """
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return _nominal_khz(Path("/proc/cpuinfo").read_text())
    code.write(_READ_TSC)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    started, first = time.perf_counter_ns(), read()
    time.sleep(_MEASURE_SECONDS)
    ended, last = time.perf_counter_ns(), read()
    khz: int = round((last - first) * 1_000_000 / (ended - started))
    return khz


def _nominal_khz(cpuinfo: str) -> int:
    found = re.search(r"^cpu MHz\s*:\s*([0-9.]+)", cpuinfo, re.MULTILINE)
    return round(float(found[1]) * 1000) if found else 2_000_000
