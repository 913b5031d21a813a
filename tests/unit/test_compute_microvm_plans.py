"""Decisions about a VM that need no VM: its size, its command line, its network's rules, and admission."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import hypercore_agents
from hypercore_agents.api.guest import AGENT_PORT, BootParameters
from hypercore_agents.compute.base import InsufficientResources, SandboxRefused, SandboxRequest
from hypercore_agents.compute.host.capacity import HostSnapshot
from hypercore_agents.compute.microvm import network, shim_protocol, template_holder
from hypercore_agents.compute.microvm.admission import HostResources, check
from hypercore_agents.compute.microvm.launch import gateway_of
from hypercore_agents.compute.microvm.machine import GATEWAY_URL, Machine
from hypercore_agents.compute.microvm.records import VmRecord
from hypercore_agents.compute.microvm.shim import _with_numbers
from hypercore_agents.compute.microvm.sizes import SIZE_CLASSES, SizeClass, size_class
from hypercore_agents.compute.microvm.templates import template_key

MACHINE = Machine(Path("/usr/bin/qemu-system-x86_64"), "tcg", 2, 1024, 2_600_000)
REQUEST = SandboxRequest("agent-0123456789abcdef", 1, 512, "http://127.0.0.1:8090", "s" * 40)


def test_at_most_eight_size_classes_exist_in_ascending_order() -> None:
    assert len(SIZE_CLASSES) <= 8
    for smaller, larger in itertools.pairwise(SIZE_CLASSES):
        assert smaller.memory_mb < larger.memory_mb
        assert smaller.cores <= larger.cores


@pytest.mark.parametrize(
    ("cores", "memory_mb", "expected"),
    [
        (1, 512, SizeClass(1, 512)),
        (1, 513, SizeClass(2, 1024)),
        (4, 8192, SizeClass(4, 8192)),
        (4, 512, SizeClass(4, 4096)),
        (32, 65536, SizeClass(32, 65536)),
    ],
)
def test_a_request_gets_the_next_size_class(cores: int, memory_mb: int, expected: SizeClass) -> None:
    assert size_class(cores, memory_mb) == expected
    assert size_class(cores, expected.memory_mb) == expected


@pytest.mark.parametrize(
    ("cores", "memory_mb", "field"), [(1, 511, "memory"), (33, 512, "cores"), (1, 65537, "memory")]
)
def test_a_request_beyond_all_classes_is_refused(cores: int, memory_mb: int, field: str) -> None:
    with pytest.raises(SandboxRefused) as refusal:
        check(replace(REQUEST, cores=cores, memory_mb=memory_mb))
    assert refusal.value.details == {"field": field}
    assert refusal.value.status == 400


def test_a_gpu_is_refused_with_the_reason() -> None:
    with pytest.raises(SandboxRefused, match="has no GPUs"):
        check(replace(REQUEST, gpu_quota_mb=1))


def test_the_command_line_opens_no_host_path_except_qemu() -> None:
    for memory in ("own", "template", "clone"):
        arguments = MACHINE.arguments(memory)
        paths = [argument for argument in arguments[1:] if "/" in argument.replace("/proc/self/fd/", "")]
        # the kernel's command line, which has the address of the VM's network
        assert paths == [MACHINE.kernel_line()]


def test_a_clone_has_the_devices_of_its_template_and_no_balloon() -> None:
    def devices(memory: str) -> list[str]:
        arguments = MACHINE.arguments(memory)  # type: ignore[arg-type]
        return [value for name, value in itertools.pairwise(arguments) if name in ("-device", "-drive")]

    assert devices("clone") == devices("template")
    assert "balloon" not in " ".join(MACHINE.arguments("clone"))


def test_a_clone_maps_touched_blocks_privately_and_others_anonymously() -> None:
    def memory(arguments: list[str]) -> list[str]:
        return [value for name, value in itertools.pairwise(arguments) if name in ("-object", "-numa")]

    blocks = MACHINE.blocks()
    assert len(blocks) == 128
    assert sum(blocks.values()) == MACHINE.memory_mb
    template, clone = memory(MACHINE.arguments("template")), memory(MACHINE.arguments("clone", {"ram1"}))
    assert template[2:4] == [
        "memory-backend-file,id=ram1,size=8M,mem-path=/proc/self/fd/{ram1},share=on", "node,memdev=ram1",
    ]  # fmt: skip
    assert clone[:4] == [
        "memory-backend-ram,id=ram0,size=8M", "node,memdev=ram0",
        "memory-backend-file,id=ram1,size=8M,mem-path=/proc/self/fd/{ram1},share=off", "node,memdev=ram1",
    ]  # fmt: skip
    assert "share=on" not in " ".join(clone)


@pytest.mark.parametrize("size", SIZE_CLASSES)
def test_blocks_fit_qemus_nodes_and_one_message(size: SizeClass) -> None:
    blocks = replace(MACHINE, memory_mb=size.memory_mb).blocks()
    assert sum(blocks.values()) == size.memory_mb
    assert len(blocks) <= 128
    for limit in (shim_protocol._MAX_DESCRIPTORS, template_holder.MAX_DESCRIPTORS):
        assert len(blocks) + 16 <= limit <= 253


def test_qemu_cannot_start_programs_or_gain_privileges() -> None:
    arguments = MACHINE.arguments("own")
    sandbox = arguments[arguments.index("-sandbox") + 1]
    assert set(sandbox.split(",")) == {
        "on", "obsolete=deny", "elevateprivileges=deny", "spawn=deny", "resourcecontrol=deny",
    }  # fmt: skip


def test_the_kernel_line_has_only_the_common_boot_parameters() -> None:
    line = MACHINE.kernel_line()
    assert BootParameters.parse(line) == BootParameters("10.0.77.2/30", "10.0.77.1", GATEWAY_URL)
    assert "tsc_early_khz=2600000" in line
    assert "tsc_early_khz" not in replace(MACHINE, accelerator="kvm", tsc_khz=None).kernel_line()


def test_descriptor_names_are_replaced_by_numbers() -> None:
    assert _with_numbers("file=/proc/self/fd/{root},x={ram}", {"root": "7", "ram": "12"}) == "file=/proc/self/fd/7,x=12"


def test_the_rules_drop_by_default_and_open_one_port_per_direction() -> None:
    rules = network.rules(gateway=True)
    assert rules.count("policy drop") == 3
    assert rules.count("dport") == 2
    assert f"ip daddr {network.HOST} tcp dport {network.GATEWAY_PORT} ct state new accept" in rules
    assert f"ip daddr {network.GUEST} tcp dport {network.AGENT_PORT} ct state new accept" in rules
    assert str(network.GATEWAY_PORT) not in network.rules(gateway=False)


def test_shim_and_guest_use_the_same_agent_port() -> None:
    assert network.AGENT_PORT == AGENT_PORT


def test_a_template_key_depends_on_image_qemu_processor_and_size() -> None:
    def key(image: str = "i", machine: Machine = MACHINE, disk: int = 64, qemu: str = "7", cpu: str = "c") -> str:
        return template_key(image, machine, disk, qemu, cpu)

    others = [
        key(image="j"),
        key(qemu="8"),
        key(cpu="d"),
        key(disk=65),
        key(machine=replace(MACHINE, memory_mb=2048)),
        key(machine=replace(MACHINE, cores=1)),
        key(machine=replace(MACHINE, accelerator="kvm", tsc_khz=None)),
    ]
    assert len({key(), *others}) == len(others) + 1
    assert key(machine=replace(MACHINE, tsc_khz=2_600_001)) == key()


RESOURCES = HostResources(cores=2, memory_mb=4000, cpu_overcommit=4, overhead_mb=100, scratch_mb=500)
HOST = HostSnapshot(load=0.5, memory_free_mb=3000, disk_mb=20_000, disk_free_mb=2_000)


def test_a_vm_that_fits_is_admitted() -> None:
    RESOURCES.admit(8, SizeClass(8, 3500), RESOURCES.usage([], 0, 0, HOST))


def test_a_host_that_is_too_small_refuses_with_the_numbers() -> None:
    with pytest.raises(SandboxRefused, match=r"2, so agents may have 8 .*9 were requested"):
        RESOURCES.admit(9, SizeClass(16, 512), RESOURCES.usage([], 0, 0, HOST))
    with pytest.raises(SandboxRefused, match=r"3600 MB for agents.*3601"):
        RESOURCES.admit(1, SizeClass(1, 3501), RESOURCES.usage([], 0, 0, HOST))


def test_a_full_host_reports_what_is_left() -> None:
    records = [VmRecord("a", 0.0, cores=6, memory_mb=1024), VmRecord("b", 0.0, cores=1, memory_mb=1024)]
    usage = RESOURCES.usage(records, 200, 0, HOST)
    assert (usage.cores_used, usage.memory_used_mb, usage.sandboxes) == (7, 2448, 2)
    with pytest.raises(
        InsufficientResources, match=r"1 of 8 cores and 1152 of 3600 MB are left beside 2 agents"
    ) as full:
        RESOURCES.admit(2, SizeClass(2, 1024), usage)
    assert full.value.status == 503
    assert full.value.retry_after
    with pytest.raises(InsufficientResources):
        RESOURCES.admit(1, SizeClass(1, 1100), usage)
    RESOURCES.admit(1, SizeClass(1, 1024), usage)


def test_a_sparse_disk_counts_in_full() -> None:
    """Of 2000 MB free, 1000 (a twentieth of the disk) are reserved for the host; VMs have allocated 100 already."""
    records = [VmRecord("a", 0.0, cores=1, memory_mb=512, disk_mb=500)]
    usage = RESOURCES.usage(records, 0, 100, HOST)
    assert (usage.disk_mb, usage.disk_used_mb, usage.disk_free_mb) == (1100, 500, 2000)
    RESOURCES.admit(1, SizeClass(1, 512), usage)
    fuller = RESOURCES.usage([*records, replace(records[0])], 0, 100, HOST)
    with pytest.raises(
        InsufficientResources, match=r"cannot hold 500 MB more \(SCRATCH_MB\): 100 of 1100 MB .* 2 agents"
    ) as full:
        RESOURCES.admit(1, SizeClass(1, 512), fuller)
    assert (full.value.status, full.value.details) == (503, {"disk_asked_mb": 500, "disk_left_mb": 100})
    assert full.value.retry_after


def test_a_record_of_an_earlier_release_counts_no_disk() -> None:
    record = VmRecord("agent-0123456789abcdef", 1.0, memory_mb=512, disk_mb=64)
    assert VmRecord.from_json(record.to_json()) == record
    earlier = {name: value for name, value in json.loads(record.to_json()).items() if name != "disk_mb"}
    assert VmRecord.from_json(json.dumps(earlier).encode()) == replace(record, disk_mb=0)


@pytest.mark.parametrize("url", ["https://gateway:443", "http://", "ftp://127.0.0.1:1", "http://127.0.0.1:99999"])
def test_a_gateway_url_that_cannot_be_forwarded_is_refused(url: str) -> None:
    with pytest.raises(SandboxRefused) as refusal:
        gateway_of(url)
    assert refusal.value.details == {"field": "gateway_url"}


def test_the_gateways_address_is_resolved() -> None:
    assert gateway_of("http://127.0.0.1:8090") == ("127.0.0.1", 8090)


def test_the_shim_is_small_and_imports_only_the_standard_library() -> None:
    folder = Path(hypercore_agents.__file__).parents[1]
    look = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import hypercore_agents.compute.microvm.shim\n"
        "known = sys.stdlib_module_names | {'__main__'}\n"
        "for name in [*sys.modules]:\n"
        "  if name.partition('.')[0] not in known: print(name, sys.modules[name].__file__)"
    )
    shown = subprocess.run([sys.executable, "-I", "-S", "-c", look], capture_output=True, text=True, check=True).stdout
    loaded = dict(line.split(" ", 1) for line in shown.splitlines())
    assert loaded.keys() >= {"hypercore_agents.compute.microvm.shim", "hypercore_agents.compute.microvm.network"}
    assert {name.partition(".")[0] for name in loaded} == {"hypercore_agents"}
    assert sum(len(Path(path).read_text().splitlines()) for path in loaded.values()) < 1350
