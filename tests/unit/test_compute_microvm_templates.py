"""Templates are created, shared, evicted and removed. A function of the test creates snapshots, without VMs."""

import asyncio
import fcntl
import json
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.microvm.machine import Machine
from hypercore_agents.compute.microvm.template_groups import TemplateGroups
from hypercore_agents.compute.microvm.template_memory import Snapshot, Template, TemplateInstance
from hypercore_agents.compute.microvm.templates import Templates
from hypercore_agents.compute.testing.conformance import eventually
from hypercore_agents.kit.linux.cgroups import detect
from support.descriptors import descriptor_count

pytestmark = pytest.mark.root  # a template holder starts as root and gives it up

MACHINE = Machine(Path("/usr/bin/true"), "tcg", 1, 512, None)


class Creator:
    """Creates snapshots of one megabyte."""

    def __init__(self) -> None:
        self.created = 0
        self.failure: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, machine: Machine, folder: Path, groups: Sequence[str] = ()) -> Snapshot:
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.created += 1
        memory, state = (os.memfd_create(name, os.MFD_ALLOW_SEALING) for name in ("memory", "state"))
        os.write(memory, bytes([self.created]) * (1 << 20))
        (folder / "scratch").write_bytes(b"disk")
        return Snapshot({"ram0": memory}, state, folder / "scratch")


def content(template: Template | None) -> int:
    assert template is not None
    assert template.scratch.read_bytes() == b"disk"
    return content_of(template)


def content_of(template: Template) -> int:
    return os.pread(template.memory["ram0"], 1, 0)[0]


Open = Callable[..., Templates]


async def _wait_until_empty(folder: Path) -> None:
    async def gone() -> bool:
        return not list(folder.glob("*"))

    await eventually(gone)


async def test_a_template_is_created_once_and_shared(tmp_path: Path) -> None:
    creator = Creator()
    templates = Templates(tmp_path, creator, memory_mb=100, linger=0)
    found = await asyncio.gather(*(templates.get("one", MACHINE) for _ in range(3)))
    assert [content(template) for template in found] == [1, 1, 1]
    assert templates.usage_mb() == 1
    await templates.close()
    assert list(tmp_path.glob("*")) == []


async def test_a_successor_finds_a_lingering_template(tmp_path: Path) -> None:
    creator = Creator()
    first = Templates(tmp_path, creator, memory_mb=100, linger=60)
    await first.get("one", MACHINE)
    await first.close()
    second = Templates(tmp_path, creator, memory_mb=100, linger=0)
    assert content(await second.get("one", MACHINE)) == 1
    await second.close()
    assert creator.created == 1
    assert list(tmp_path.glob("*")) == []


async def test_close_ends_templates_that_a_killed_process_leaves(tmp_path: Path) -> None:
    creator = Creator()
    killed = Templates(tmp_path, creator, memory_mb=100, linger=60, end_on_close=True)
    template = await killed.get("one", MACHINE)
    assert template is not None
    template.lease.close()  # as the kernel does for a killed process
    successor = Templates(tmp_path, creator, memory_mb=100, linger=60, end_on_close=True)
    assert content(await successor.get("one", MACHINE)) == 1
    assert creator.created == 1
    await successor.close()
    assert list(tmp_path.glob("*")) == []
    for descriptor in (*template.memory.values(), template.state):
        os.close(descriptor)


async def test_a_template_without_leases_ends_by_itself(tmp_path: Path) -> None:
    templates = Templates(tmp_path, Creator(), memory_mb=100, linger=0.2)
    await templates.get("one", MACHINE)
    await templates.close()

    async def found_gone() -> bool:
        return Templates(tmp_path, Creator(), memory_mb=100, linger=0).usage_mb() == 0

    await eventually(found_gone)
    await _wait_until_empty(tmp_path)


async def test_the_least_recently_used_template_is_evicted(tmp_path: Path) -> None:
    creator = Creator()
    templates = Templates(tmp_path, creator, memory_mb=2, linger=0)
    await templates.get("one", MACHINE)
    await templates.get("two", MACHINE)
    os.utime(tmp_path / "two" / "template.json", (1, 1))
    await templates.get("one", MACHINE)
    await templates.get("three", MACHINE)
    assert {path.name for path in tmp_path.glob("*")} == {"one", "three"}
    assert content(await templates.get("two", MACHINE)) == 4
    await templates.close()
    await _wait_until_empty(tmp_path)


async def test_a_template_larger_than_the_limit_is_not_stored(tmp_path: Path) -> None:
    class Large(Creator):
        async def __call__(self, machine: Machine, folder: Path, groups: Sequence[str] = ()) -> Snapshot:
            snapshot = await super().__call__(machine, folder)
            os.write(snapshot.memory["ram0"], bytes(2 << 20))
            return snapshot

    templates = Templates(tmp_path, Large(), memory_mb=2, linger=0)
    assert await templates.get("one", MACHINE) is None
    assert list(tmp_path.glob("*")) == []
    await templates.close()


async def test_no_template_is_created_with_a_limit_of_zero(tmp_path: Path) -> None:
    creator = Creator()
    templates = Templates(tmp_path / "never", creator, memory_mb=0, linger=0)
    assert await templates.get("one", MACHINE) is None
    assert creator.created == 0
    assert not (tmp_path / "never").exists()


async def test_a_killed_holder_is_replaced(tmp_path: Path) -> None:
    creator = Creator()
    templates = Templates(tmp_path, creator, memory_mb=100, linger=0)
    template = await templates.get("one", MACHINE)
    assert template is not None
    holder = json.loads((tmp_path / "one" / "template.json").read_text())["holder"]["pid"]
    os.kill(holder, signal.SIGKILL)

    async def noticed() -> bool:
        return not template.has_holder()

    await eventually(noticed)
    assert content(await templates.get("one", MACHINE)) == 2
    await templates.close()
    assert list(tmp_path.glob("*")) == []


async def test_a_failed_creation_leaves_nothing_and_is_retried(tmp_path: Path) -> None:
    creator = Creator()
    creator.failure = SandboxError("it hung")
    templates = Templates(tmp_path, creator, memory_mb=100, linger=0)
    with pytest.raises(SandboxError, match="it hung"):
        await templates.get("one", MACHINE)
    assert list(tmp_path.glob("*")) == []
    creator.failure = None
    assert content(await templates.get("one", MACHINE)) == 1
    await templates.close()


async def test_a_cancelled_caller_does_not_stop_the_creation(tmp_path: Path) -> None:
    creator = Creator()
    creator.gate.clear()
    templates = Templates(tmp_path, creator, memory_mb=100, linger=0)
    impatient = asyncio.create_task(templates.get("one", MACHINE))
    await asyncio.sleep(0)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    creator.gate.set()
    assert content(await templates.get("one", MACHINE)) == 1
    assert creator.created == 1
    await templates.close()


async def test_the_memory_of_a_template_is_sealed(tmp_path: Path) -> None:
    templates = Templates(tmp_path, Creator(), memory_mb=100, linger=0)
    template = await templates.get("one", MACHINE)
    assert template is not None
    for descriptor in (*template.memory.values(), template.state):
        opened_again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
        with pytest.raises(PermissionError):
            os.pwrite(opened_again, b"x", 0)
        os.close(opened_again)
    await templates.close()


async def test_close_releases_late_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (Templates(tmp_path, Creator(), memory_mb=100, linger=60) for _ in range(2))
    await first.get("one", MACHINE)
    found, proceed, find = threading.Event(), threading.Event(), Templates._find

    def slow(self: Templates, key: str) -> Template | None:
        template = find(self, key)
        found.set()
        proceed.wait(20)
        return template

    monkeypatch.setattr(Templates, "_find", slow)
    before = descriptor_count()
    getting = asyncio.create_task(second.get("one", MACHINE))
    await asyncio.to_thread(found.wait, 20)
    closing = asyncio.create_task(second.close())
    await asyncio.sleep(0)
    proceed.set()
    await closing
    with pytest.raises(asyncio.CancelledError):
        await getting
    assert descriptor_count() == before
    first._end_on_close = True
    await first.close()


async def test_a_copied_folder_does_not_end_the_originals_holder(tmp_path: Path) -> None:
    original, creator = Templates(tmp_path / "original", Creator(), memory_mb=2, linger=60), Creator()
    template = await original.get("one", MACHINE)
    shutil.copytree(tmp_path / "original", tmp_path / "copy", ignore=lambda folder, names: {"socket"} & set(names))
    copy = Templates(tmp_path / "copy", creator, memory_mb=1, linger=0)
    assert content(await copy.get("two", MACHINE)) == 1, "the copy evicts its own template, not the original"
    await copy.close()
    assert template is not None
    assert template.has_holder()
    await original.close()


async def test_untouched_blocks_are_dropped_and_holes_are_filled(tmp_path: Path) -> None:
    class Blocks(Creator):
        async def __call__(self, machine: Machine, folder: Path, groups: Sequence[str] = ()) -> Snapshot:
            snapshot = await super().__call__(machine, folder)
            for name in ("ram1", "ram2"):
                snapshot.memory[name] = os.memfd_create(name, os.MFD_ALLOW_SEALING)
                os.ftruncate(snapshot.memory[name], 4 << 20)
            os.pwrite(snapshot.memory["ram2"], b"touched", 1 << 20)
            return snapshot

    templates = Templates(tmp_path, Blocks(), memory_mb=100, linger=0)
    template = await templates.get("one", MACHINE)
    assert template is not None
    assert set(template.memory) == {"ram0", "ram2"}
    assert os.fstat(template.memory["ram2"]).st_blocks * 512 == 4 << 20
    assert os.pread(template.memory["ram2"], 9, 1 << 20) == b"touched\0\0"
    assert templates.usage_mb() == template.instance.size_mb == 5
    await templates.close()


async def test_an_evicted_template_is_freed_after_the_last_start(tmp_path: Path) -> None:
    templates = Templates(tmp_path, Creator(), memory_mb=1, linger=0)
    template = await templates.get("one", MACHINE)
    assert template is not None
    with template.in_use():
        assert await templates.get("two", MACHINE) is not None
        assert template.closed
        assert content_of(template) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(template.memory["ram0"])
    await templates.close()


async def test_templates_of_running_clones_count_and_are_not_evicted(tmp_path: Path) -> None:
    in_use: list[TemplateInstance] = []
    templates = Templates(tmp_path, Creator(), memory_mb=2, linger=0, instances_in_use=lambda: in_use)
    template = await templates.get("one", MACHINE)
    assert template is not None
    in_use.append(template.instance)
    assert templates.usage_mb() == 1
    assert await templates.get("two", MACHINE) is not None
    # The template without clones is evicted, although the other was used longer ago.
    os.utime(tmp_path / "one" / "template.json", (1, 1))
    assert await templates.get("three", MACHINE) is not None
    assert {path.name for path in tmp_path.glob("*")} == {"one", "three"}
    # A template whose holder has ended counts while its clones run.
    templates.end_all(["one"])
    assert templates.usage_mb() == 2
    in_use.append(TemplateInstance("another", 1))
    assert await templates.get("four", MACHINE) is None
    in_use.clear()
    assert templates.usage_mb() == 1
    await templates.close()


async def test_an_unfinished_template_counts_with_the_size_of_its_vm(tmp_path: Path) -> None:
    creator = Creator()
    creator.gate.clear()
    templates = Templates(tmp_path, creator, memory_mb=100, linger=0, overhead_mb=88)
    getting = asyncio.create_task(templates.get("one", MACHINE))

    async def counted() -> bool:
        return templates.usage_mb() == 600

    await eventually(counted)
    assert templates.usage_mb(include_unfinished=False) == 0
    creator.gate.set()
    await getting
    assert templates.usage_mb() == 1
    await templates.close()


async def test_no_template_is_created_if_its_vm_does_not_fit(tmp_path: Path) -> None:
    available_mb, creator = [511], Creator()
    templates = Templates(tmp_path, creator, memory_mb=100, linger=0, available_mb=lambda: available_mb[0])
    assert await templates.get("one", MACHINE) is None
    assert creator.created == 0
    available_mb[0] = 512
    template = await templates.get("one", MACHINE)
    assert content(template) == 1
    # Its size is known now, so it is not created again if it would not fit beside a clone.
    await templates.free_memory(1, "one")
    assert templates.usage_mb() == 0
    assert await templates.get("one", MACHINE) is None
    assert creator.created == 1
    await templates.close()


async def test_leftovers_of_a_dead_holder_do_not_count_and_are_removed(tmp_path: Path) -> None:
    templates = Templates(tmp_path, Creator(), memory_mb=100, linger=0)
    assert await templates.get("one", MACHINE) is not None
    holder = json.loads((tmp_path / "one" / "template.json").read_text())["holder"]["pid"]
    os.kill(holder, signal.SIGKILL)

    async def gone() -> bool:
        return templates.usage_mb() == 0 and not list(tmp_path.glob("*"))

    await eventually(gone)
    await templates.close()


class SparseCreator(Creator):
    """Creates snapshots with one block of which one page was touched."""

    size_mb = 64

    async def __call__(self, machine: Machine, folder: Path, groups: Sequence[str] = ()) -> Snapshot:
        snapshot = await super().__call__(machine, folder)
        os.ftruncate(snapshot.memory["ram0"], self.size_mb << 20)
        return snapshot


def own_shared_memory_mb() -> float:
    """Return the shared memory that this process's group is charged with, without the groups below it."""
    groups = detect()
    assert groups is not None
    statistics = (groups.bases["memory"] / "memory.stat").read_text()
    return int(dict(line.split() for line in statistics.splitlines())["shmem"]) / 2**20


@pytest.fixture
def template_groups() -> Iterator[TemplateGroups]:
    found = detect()
    if found is None or "memory" not in found.bases:
        pytest.skip("needs control groups for memory")
    groups = TemplateGroups(found, secrets.token_hex(4))
    yield groups
    assert not [path for key in ("one", "two") for path in groups.paths(key) if Path(path).exists()]


async def test_group_is_charged_all_memory(tmp_path: Path, template_groups: TemplateGroups) -> None:
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        pytest.skip("version 2 counts groups below a group with it")
    before_mb = own_shared_memory_mb()
    templates = Templates(tmp_path, SparseCreator(), memory_mb=100, linger=0, groups=template_groups)
    template = await templates.get("one", MACHINE)
    assert template is not None
    assert template.instance.size_mb == SparseCreator.size_mb
    charged = template_groups.charged_bytes("one")
    assert charged is not None
    # This process wrote the first megabyte. The group is also charged with the holder's own memory.
    assert SparseCreator.size_mb - 1 <= charged / 2**20 < SparseCreator.size_mb + 16
    assert own_shared_memory_mb() - before_mb < 2
    await templates.close()


async def test_group_goes_with_its_template(tmp_path: Path, template_groups: TemplateGroups) -> None:
    creator = SparseCreator()
    templates = Templates(tmp_path, creator, memory_mb=SparseCreator.size_mb, linger=0, groups=template_groups)
    (one,), (two,) = (template_groups.paths(key) for key in ("one", "two"))
    assert await templates.get("one", MACHINE) is not None
    assert Path(one).exists()
    assert await templates.get("two", MACHINE) is not None
    assert (Path(one).exists(), Path(two).exists()) == (False, True)
    creator.failure = SandboxError("it hung")
    with pytest.raises(SandboxError, match="it hung"):
        await templates.get("one", MACHINE)
    assert not Path(one).exists()
    holder = json.loads((tmp_path / "two" / "template.json").read_text())["holder"]["pid"]
    os.kill(holder, signal.SIGKILL)

    async def removed() -> bool:
        return templates.usage_mb() == 0 and not Path(two).exists()

    await eventually(removed)
    await templates.close()


async def test_killed_creation_loses_group(tmp_path: Path, template_groups: TemplateGroups) -> None:
    (tmp_path / ".making-one").mkdir()
    (left,) = template_groups.create("one", 64)
    templates = Templates(tmp_path, Creator(), memory_mb=100, linger=0, groups=template_groups)
    assert await templates.get("two", MACHINE) is not None
    assert not Path(left).exists()
    await templates.close()


async def test_the_error_of_a_holder_that_cannot_fill_memory_has_its_reason(tmp_path: Path) -> None:
    class Sealed(SparseCreator):
        async def __call__(self, machine: Machine, folder: Path, groups: Sequence[str] = ()) -> Snapshot:
            snapshot = await super().__call__(machine, folder)
            fcntl.fcntl(snapshot.memory["ram0"], fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
            return snapshot

    templates = Templates(tmp_path, Sealed(), memory_mb=100, linger=0)
    with pytest.raises(SandboxError, match=r"memory cannot be filled: .*Operation not permitted"):
        await templates.get("one", MACHINE)
    assert list(tmp_path.glob("*")) == []
    await templates.close()
