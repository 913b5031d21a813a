"""Fixtures with a real microVM: the real image, booted under TCG by plain QEMU with its user-mode network.

A missing image is built (which takes minutes at worst, once per machine and state of the sources).
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hypercore_agents.api.guest import (
    CONTROL_PORT,
    LOG_PORT,
    ROOT_SERIAL,
    SCRATCH_SERIAL,
    BootParameters,
    Identity,
    parse_message,
)
from hypercore_agents.compute.microvm.accelerator import QEMU
from hypercore_agents.compute.microvm.image import Image, build
from support.microvm_backend import MicrovmSubject, Place, cannot_run
from support.ports import free_port

SCRATCH_MB = 512
"""Disk of a VM, in MB."""
BOOT_SECONDS = 180.0
"""Maximum duration of a boot on a busy machine without KVM, in seconds."""


@pytest.fixture(scope="session")
def guest_image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The image of this checkout, from the shared folder of the machine."""
    if os.geteuid() != 0 or shutil.which(QEMU) is None or shutil.which("mmdebstrap") is None:
        pytest.skip("building and booting an image needs root, QEMU and mmdebstrap")
    return build(tmp_path_factory.mktemp("state"))


@dataclass
class Guest:
    """A booted VM, seen from its host."""

    url: str
    folder: Path
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def hear(self, kind: str, *, seconds: float = BOOT_SECONDS) -> dict[str, Any]:
        """Return the next message, which must be of this kind."""
        async with asyncio.timeout(seconds):
            line = await self.reader.readline()
        assert line, f"the guest ended before it sent {kind}: {self.console()}"
        received, body = parse_message(line)
        assert received == kind, f"{received} {body} {self.console()}"
        return body

    def say(self, line: bytes) -> None:
        self.writer.write(line)

    def console(self) -> str:
        """Return the output of the serial console and of the log port."""
        return "".join((self.folder / name).read_text(errors="replace")[-4000:] for name in ("serial", "log"))


def identity(agent_id: str, secret: str, **environment: str) -> Identity:
    return Identity(agent_id, agent_id, time.time(), secrets.token_bytes(64), secret, environment)


@contextlib.asynccontextmanager
async def booted(image: Image, folder: Path, gateway_port: int) -> AsyncIterator[Guest]:
    """Boot a VM until it waits for an identity; end it afterwards."""
    folder.mkdir()
    scratch, port = folder / "scratch", free_port()
    with scratch.open("wb") as file:
        file.truncate(SCRATCH_MB << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-O", "quota,project", scratch], check=True)
    boot = BootParameters("10.0.2.15/24", "10.0.2.2", f"http://10.0.2.2:{gateway_port}")
    command = [
        *(QEMU, "-M", "microvm,acpi=on,pcie=off,rtc=on", "-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max"),
        *("-smp", "2", "-m", "768", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-serial", f"file:{folder}/serial", "-kernel", image.kernel, "-initrd", image.initrd),
        *("-append", f"console=ttyS0 quiet reboot=t panic=-1 {clock()} {boot.command_line()}"),
        *("-drive", f"id=root,file={image.root},format=raw,if=none,readonly=on"),
        *("-device", f"virtio-blk-device,drive=root,serial={ROOT_SERIAL}"),
        *("-drive", f"id=scratch,file={scratch},format=raw,if=none"),
        *("-device", f"virtio-blk-device,drive=scratch,serial={SCRATCH_SERIAL}"),
        *("-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{port}-:8080", "-device", "virtio-net-device,netdev=net"),
        *("-device", "virtio-rng-device", "-device", "virtio-serial-device"),
        *("-chardev", f"socket,id=control,path={folder}/control,server=on,wait=off"),
        *("-device", f"virtserialport,chardev=control,name={CONTROL_PORT}"),
        *("-chardev", f"file,id=log,path={folder}/log", "-device", f"virtserialport,chardev=log,name={LOG_PORT}"),
    ]
    process = await asyncio.create_subprocess_exec(*map(str, command))
    try:
        async with asyncio.timeout(30):
            while not (folder / "control").exists() or not (folder / "log").exists():
                assert process.returncode is None
                await asyncio.sleep(0.02)
        reader, writer = await asyncio.open_unix_connection(folder / "control")
        guest = Guest(f"http://127.0.0.1:{port}", folder, process, reader, writer)
        try:
            await guest.hear("waiting-for-identity")
            yield guest
        finally:
            writer.close()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def clock() -> str:
    """Return kernel arguments that skip the calibration of the clock, which may hang under TCG."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return f"tsc_early_khz={int(float(line.partition(':')[2]) * 1000)} tsc=reliable no_timer_check"
    return "no_timer_check"


@pytest.fixture(scope="session")
def microvm_place(guest_image: Image) -> Iterator[Place]:
    """A state directory of the microvm backend for this test run, whose VMs are tiny guests."""
    lacking = cannot_run()
    if lacking:
        pytest.skip(lacking)
    place = Place(guest_image)
    yield place
    asyncio.run(place.close())


@pytest.fixture
async def subject(microvm_place: Place) -> AsyncIterator[MicrovmSubject]:
    """Yield a backend and its parts; stop its sandboxes and close it afterwards."""
    subject = MicrovmSubject(microvm_place)
    yield subject
    for sandbox in await subject.backend.list():
        await subject.backend.stop(sandbox.agent_id, grace=0)
    await subject.backend.close()
