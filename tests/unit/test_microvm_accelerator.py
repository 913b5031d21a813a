"""The choice of the accelerator and its reason, with stand-ins for QEMU that boot, hang or fail."""

import hashlib
import json
from pathlib import Path

import pytest

from hypercore_agents.compute.microvm.accelerator import accelerator, probe
from hypercore_agents.compute.microvm.image import Image

BOOTS = """#!/bin/sh
[ "$1" = --version ] && exec echo QEMU of a test
echo booted >> "$0.starts"
while [ $# -gt 0 ]; do
  case $1 in -initrd) initrd=$2;; -serial) serial=${2#file:};; esac
  shift
done
grep -a -o 'up-[0-9a-f]*' "$initrd" > "$serial"
exec sleep 60
"""
HANGS = "#!/bin/sh\n[ $1 = --version ] && exec echo QEMU of a test\nexec sleep 60\n"
FAILS = "#!/bin/sh\nexit 7\n"


@pytest.fixture
def image(tmp_path: Path) -> Image:
    for name in ("vmlinuz", "busybox"):
        (tmp_path / name).write_text(name)
    files = {"vmlinuz": hashlib.sha256(b"vmlinuz").hexdigest()}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    return Image(tmp_path, "id", "inputs", 0.0)


def qemu(folder: Path, script: str) -> str:
    path = folder / "qemu"
    path.write_text(script)
    path.chmod(0o755)
    return str(path)


def test_kvm_is_chosen_when_the_kernel_boots(image: Image, tmp_path: Path) -> None:
    found = probe(image, qemu=qemu(tmp_path, BOOTS), seconds=30)
    assert found.name == "kvm"


@pytest.mark.parametrize(
    ("script", "reason"), [(HANGS, "did not boot under KVM within 0.2 s"), (FAILS, "status 7")], ids=["hangs", "fails"]
)
def test_tcg_is_chosen_if_kvm_fails(script: str, reason: str, image: Image, tmp_path: Path) -> None:
    found = probe(image, qemu=qemu(tmp_path, script), seconds=0.2 if script is HANGS else 30)
    assert found.name == "tcg"
    assert reason in found.reason


def test_no_probe_runs_without_the_kvm_device(image: Image, tmp_path: Path) -> None:
    found = accelerator(image, tmp_path / "cache", device=tmp_path / "kvm", qemu="/no/such/qemu")
    assert found.name == "tcg"
    assert "does not exist" in found.reason


def test_the_result_is_cached_per_host_boot_kernel_and_qemu(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, cache, program = tmp_path / "kvm", tmp_path / "cache", qemu(tmp_path, BOOTS)
    device.touch()
    starts = Path(f"{program}.starts")
    first = accelerator(image, cache, device=device, qemu=program)
    assert first.name == "kvm"
    assert accelerator(image, cache, device=device, qemu=program) == first
    assert len(starts.read_text().splitlines()) == 1

    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"vmlinuz": "another kernel"}}))
    accelerator(image, cache, device=device, qemu=program)
    assert len(starts.read_text().splitlines()) == 2

    (cache / "accelerator.json").write_text("{")  # truncated
    accelerator(image, cache, device=device, qemu=program)
    assert len(starts.read_text().splitlines()) == 3

    (tmp_path / "boot").write_text("id of the next boot\n")
    monkeypatch.setattr("hypercore_agents.compute.microvm.accelerator._BOOT_ID", tmp_path / "boot")
    accelerator(image, cache, device=device, qemu=program)
    assert len(starts.read_text().splitlines()) == 4


def test_a_missing_qemu_is_named_as_the_reason(image: Image) -> None:
    assert "cannot be started" in probe(image, qemu="/no/such/qemu").reason
