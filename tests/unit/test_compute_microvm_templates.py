"""How templates are kept, without a VM: what makes one is a function of the test."""

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
from hypercore_agents.compute.microvm.template_memory import Account, Frozen, Template
from hypercore_agents.compute.microvm.templates import Templates
from hypercore_agents.compute.testing.conformance import eventually
from hypercore_agents.kit.linux.cgroups import detect
from support.descriptors import descriptor_count

MACHINE = Machine(Path("/usr/bin/true"), "tcg", 1, 512, None)


class Maker:
    """Makes templates of one megabyte."""

    def __init__(self) -> None:
        self.made = 0
        self.failure: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, machine: Machine, folder: Path, groups: Sequence[str] = ()) -> Frozen:
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.made += 1
        memory, state = (os.memfd_create(name, os.MFD_ALLOW_SEALING) for name in ("memory", "state"))
        os.write(memory, bytes([self.made]) * (1 << 20))
        (folder / "scratch").write_bytes(b"disk")
        return Frozen({"ram0": memory}, state, folder / "scratch")


def content(template: Template | None) -> int:
    assert template is not None
    assert template.scratch.read_bytes() == b"disk"
    return content_of(template)


def content_of(template: Template) -> int:
    return os.pread(template.memory["ram0"], 1, 0)[0]


Open = Callable[..., Templates]


async def _gone(folder: Path) -> None:
    async def gone() -> bool:
        return not list(folder.glob("*"))

    await eventually(gone)


async def test_a_template_is_made_once_and_shared(tmp_path: Path) -> None:
    maker = Maker()
    templates = Templates(tmp_path, maker, memory_mb=100, linger=0)
    found = await asyncio.gather(*(templates.get("one", MACHINE) for _ in range(3)))
    assert [content(template) for template in found] == [1, 1, 1]
    assert templates.usage_mb() == 1
    await templates.close()
    assert list(tmp_path.glob("*")) == []


async def test_a_successor_finds_it_while_it_lingers(tmp_path: Path) -> None:
    maker = Maker()
    first = Templates(tmp_path, maker, memory_mb=100, linger=60)
    await first.get("one", MACHINE)
    await first.close()
    second = Templates(tmp_path, maker, memory_mb=100, linger=0)
    assert content(await second.get("one", MACHINE)) == 1
    await second.close()
    assert maker.made == 1
    assert list(tmp_path.glob("*")) == []


async def test_a_close_ends_templates_and_a_killed_process_leaves_them_to_its_successor(tmp_path: Path) -> None:
    maker = Maker()
    killed = Templates(tmp_path, maker, memory_mb=100, linger=60, end_on_close=True)
    template = await killed.get("one", MACHINE)
    assert template is not None
    template.lease.close()  # as the kernel does
    successor = Templates(tmp_path, maker, memory_mb=100, linger=60, end_on_close=True)
    assert content(await successor.get("one", MACHINE)) == 1
    assert maker.made == 1
    await successor.close()
    assert list(tmp_path.glob("*")) == []
    for descriptor in (*template.memory.values(), template.state):
        os.close(descriptor)


async def test_it_goes_by_itself_when_nobody_wants_it(tmp_path: Path) -> None:
    templates = Templates(tmp_path, Maker(), memory_mb=100, linger=0.2)
    await templates.get("one", MACHINE)
    await templates.close()

    async def found_gone() -> bool:
        return Templates(tmp_path, Maker(), memory_mb=100, linger=0).usage_mb() == 0

    await eventually(found_gone)
    await _gone(tmp_path)


async def test_the_least_recently_used_makes_room(tmp_path: Path) -> None:
    maker = Maker()
    templates = Templates(tmp_path, maker, memory_mb=2, linger=0)
    await templates.get("one", MACHINE)
    await templates.get("two", MACHINE)
    os.utime(tmp_path / "two" / "template.json", (1, 1))
    await templates.get("one", MACHINE)
    await templates.get("three", MACHINE)
    assert {path.name for path in tmp_path.glob("*")} == {"one", "three"}
    assert content(await templates.get("two", MACHINE)) == 4
    await templates.close()
    await _gone(tmp_path)


async def test_one_that_is_larger_than_all_the_room_is_not_kept(tmp_path: Path) -> None:
    class Large(Maker):
        async def __call__(self, machine: Machine, folder: Path, groups: Sequence[str] = ()) -> Frozen:
            frozen = await super().__call__(machine, folder)
            os.write(frozen.memory["ram0"], bytes(2 << 20))
            return frozen

    templates = Templates(tmp_path, Large(), memory_mb=2, linger=0)
    assert await templates.get("one", MACHINE) is None
    assert list(tmp_path.glob("*")) == []
    await templates.close()


async def test_without_room_for_templates_none_is_made(tmp_path: Path) -> None:
    maker = Maker()
    templates = Templates(tmp_path / "never", maker, memory_mb=0, linger=0)
    assert await templates.get("one", MACHINE) is None
    assert maker.made == 0
    assert not (tmp_path / "never").exists()


async def test_a_keeper_that_was_killed_is_replaced(tmp_path: Path) -> None:
    maker = Maker()
    templates = Templates(tmp_path, maker, memory_mb=100, linger=0)
    template = await templates.get("one", MACHINE)
    assert template is not None
    keeper = json.loads((tmp_path / "one" / "template.json").read_text())["keeper"]["pid"]
    os.kill(keeper, signal.SIGKILL)

    async def noticed() -> bool:
        return not template.is_kept()

    await eventually(noticed)
    assert content(await templates.get("one", MACHINE)) == 2
    await templates.close()
    assert list(tmp_path.glob("*")) == []


async def test_a_failure_is_told_and_leaves_nothing_and_the_next_call_tries_again(tmp_path: Path) -> None:
    maker = Maker()
    maker.failure = SandboxError("it hung")
    templates = Templates(tmp_path, maker, memory_mb=100, linger=0)
    with pytest.raises(SandboxError, match="it hung"):
        await templates.get("one", MACHINE)
    assert list(tmp_path.glob("*")) == []
    maker.failure = None
    assert content(await templates.get("one", MACHINE)) == 1
    await templates.close()


async def test_a_caller_that_gives_up_does_not_stop_the_making(tmp_path: Path) -> None:
    maker = Maker()
    maker.gate.clear()
    templates = Templates(tmp_path, maker, memory_mb=100, linger=0)
    impatient = asyncio.create_task(templates.get("one", MACHINE))
    await asyncio.sleep(0)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    maker.gate.set()
    assert content(await templates.get("one", MACHINE)) == 1
    assert maker.made == 1
    await templates.close()


async def test_what_is_kept_is_sealed(tmp_path: Path) -> None:
    templates = Templates(tmp_path, Maker(), memory_mb=100, linger=0)
    template = await templates.get("one", MACHINE)
    assert template is not None
    for descriptor in (*template.memory.values(), template.state):
        anew = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
        with pytest.raises(PermissionError):
            os.pwrite(anew, b"x", 0)
        os.close(anew)
    await templates.close()


async def test_a_lease_that_comes_while_all_is_closed_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (Templates(tmp_path, Maker(), memory_mb=100, linger=60) for _ in range(2))
    await first.get("one", MACHINE)
    found, go_on, find = threading.Event(), threading.Event(), Templates._find

    def slow(self: Templates, key: str) -> Template | None:
        template = find(self, key)
        found.set()
        go_on.wait(20)
        return template

    monkeypatch.setattr(Templates, "_find", slow)
    before = descriptor_count()
    getting = asyncio.create_task(second.get("one", MACHINE))
    await asyncio.to_thread(found.wait, 20)
    closing = asyncio.create_task(second.close())
    await asyncio.sleep(0)
    go_on.set()
    await closing
    with pytest.raises(asyncio.CancelledError):
        await getting
    assert descriptor_count() == before
    first._end_on_close = True
    await first.close()


async def test_a_copied_folder_leaves_the_originals_keeper_alone(tmp_path: Path) -> None:
    original, maker = Templates(tmp_path / "original", Maker(), memory_mb=2, linger=60), Maker()
    template = await original.get("one", MACHINE)
    shutil.copytree(tmp_path / "original", tmp_path / "copy", ignore=lambda folder, names: {"socket"} & set(names))
    copy = Templates(tmp_path / "copy", maker, memory_mb=1, linger=0)
    assert content(await copy.get("two", MACHINE)) == 1, "it makes room by ending the template that was copied"
    await copy.close()
    assert template is not None
    assert template.is_kept()
    await original.close()


async def test_untouched_blocks_are_dropped_and_holes_are_filled(tmp_path: Path) -> None:
    class Blocks(Maker):
        async def __call__(self, machine: Machine, folder: Path, groups: Sequence[str] = ()) -> Frozen:
            frozen = await super().__call__(machine, folder)
            for name in ("ram1", "ram2"):
                frozen.memory[name] = os.memfd_create(name, os.MFD_ALLOW_SEALING)
                os.ftruncate(frozen.memory[name], 4 << 20)
            os.pwrite(frozen.memory["ram2"], b"touched", 1 << 20)
            return frozen

    templates = Templates(tmp_path, Blocks(), memory_mb=100, linger=0)
    template = await templates.get("one", MACHINE)
    assert template is not None
    assert set(template.memory) == {"ram0", "ram2"}
    assert os.fstat(template.memory["ram2"]).st_blocks * 512 == 4 << 20
    assert os.pread(template.memory["ram2"], 9, 1 << 20) == b"touched\0\0"
    assert templates.usage_mb() == template.account.size_mb == 5
    await templates.close()


async def test_a_template_that_is_let_go_frees_its_memory_after_the_last_start_from_it(tmp_path: Path) -> None:
    templates = Templates(tmp_path, Maker(), memory_mb=1, linger=0)
    template = await templates.get("one", MACHINE)
    assert template is not None
    with template.in_use():
        assert await templates.get("two", MACHINE) is not None
        assert template.closed
        assert content_of(template) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(template.memory["ram0"])
    await templates.close()


async def test_templates_of_running_clones_count_and_are_not_let_go(tmp_path: Path) -> None:
    lent: list[Account] = []
    templates = Templates(tmp_path, Maker(), memory_mb=2, linger=0, lent=lambda: lent)
    template = await templates.get("one", MACHINE)
    assert template is not None
    lent.append(template.account)
    assert templates.usage_mb() == 1
    assert await templates.get("two", MACHINE) is not None
    # The one without clones makes room, though the other was used longer ago.
    os.utime(tmp_path / "one" / "template.json", (1, 1))
    assert await templates.get("three", MACHINE) is not None
    assert {path.name for path in tmp_path.glob("*")} == {"one", "three"}
    # One whose keeper has gone counts as long as its clones run.
    templates._end_all(["one"])
    assert templates.usage_mb() == 2
    lent.append(Account("another", 1))
    assert await templates.get("four", MACHINE) is None
    lent.clear()
    assert templates.usage_mb() == 1
    await templates.close()


async def test_a_template_that_is_being_made_counts_as_its_virtual_machine(tmp_path: Path) -> None:
    maker = Maker()
    maker.gate.clear()
    templates = Templates(tmp_path, maker, memory_mb=100, linger=0, overhead_mb=88)
    getting = asyncio.create_task(templates.get("one", MACHINE))

    async def counted() -> bool:
        return templates.usage_mb() == 600

    await eventually(counted)
    assert templates.usage_mb(making=False) == 0
    maker.gate.set()
    await getting
    assert templates.usage_mb() == 1
    await templates.close()


async def test_no_template_is_made_where_its_virtual_machine_does_not_fit(tmp_path: Path) -> None:
    room, maker = [511], Maker()
    templates = Templates(tmp_path, maker, memory_mb=100, linger=0, room=lambda: room[0])
    assert await templates.get("one", MACHINE) is None
    assert maker.made == 0
    room[0] = 512
    template = await templates.get("one", MACHINE)
    assert content(template) == 1
    # Its size is known now: it is not made again where it would not fit beside a clone.
    await templates.give_back(1, "one")
    assert templates.usage_mb() == 0
    assert await templates.get("one", MACHINE) is None
    assert maker.made == 1
    await templates.close()


async def test_what_a_dead_keeper_left_neither_counts_nor_stays(tmp_path: Path) -> None:
    templates = Templates(tmp_path, Maker(), memory_mb=100, linger=0)
    assert await templates.get("one", MACHINE) is not None
    keeper = json.loads((tmp_path / "one" / "template.json").read_text())["keeper"]["pid"]
    os.kill(keeper, signal.SIGKILL)

    async def gone() -> bool:
        return templates.usage_mb() == 0 and not list(tmp_path.glob("*"))

    await eventually(gone)
    await templates.close()


class SparseMaker(Maker):
    """Makes templates of one block, of which one page was touched."""

    size_mb = 64

    async def __call__(self, machine: Machine, folder: Path, groups: Sequence[str] = ()) -> Frozen:
        frozen = await super().__call__(machine, folder)
        os.ftruncate(frozen.memory["ram0"], self.size_mb << 20)
        return frozen


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


async def test_the_templates_group_is_charged_with_all_of_its_memory(
    tmp_path: Path, template_groups: TemplateGroups
) -> None:
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        pytest.skip("version 2 counts groups below a group with it")
    before_mb = own_shared_memory_mb()
    templates = Templates(tmp_path, SparseMaker(), memory_mb=100, linger=0, groups=template_groups)
    template = await templates.get("one", MACHINE)
    assert template is not None
    assert template.account.size_mb == SparseMaker.size_mb
    charged = template_groups.charged_bytes("one")
    assert charged is not None
    # The first megabyte was written by this process; the keeper's own memory is charged to the group, too.
    assert SparseMaker.size_mb - 1 <= charged / 2**20 < SparseMaker.size_mb + 16
    assert own_shared_memory_mb() - before_mb < 2
    await templates.close()


async def test_a_templates_group_is_removed_with_its_template(tmp_path: Path, template_groups: TemplateGroups) -> None:
    maker = SparseMaker()
    templates = Templates(tmp_path, maker, memory_mb=SparseMaker.size_mb, linger=0, groups=template_groups)
    (one,), (two,) = (template_groups.paths(key) for key in ("one", "two"))
    assert await templates.get("one", MACHINE) is not None
    assert Path(one).exists()
    assert await templates.get("two", MACHINE) is not None
    assert (Path(one).exists(), Path(two).exists()) == (False, True)
    maker.failure = SandboxError("it hung")
    with pytest.raises(SandboxError, match="it hung"):
        await templates.get("one", MACHINE)
    assert not Path(one).exists()
    keeper = json.loads((tmp_path / "two" / "template.json").read_text())["keeper"]["pid"]
    os.kill(keeper, signal.SIGKILL)

    async def removed() -> bool:
        return templates.usage_mb() == 0 and not Path(two).exists()

    await eventually(removed)
    await templates.close()


async def test_groups_of_a_making_that_was_killed_are_removed(tmp_path: Path, template_groups: TemplateGroups) -> None:
    (tmp_path / ".making-one").mkdir()
    (left,) = template_groups.create("one", 64)
    templates = Templates(tmp_path, Maker(), memory_mb=100, linger=0, groups=template_groups)
    assert await templates.get("two", MACHINE) is not None
    assert not Path(left).exists()
    await templates.close()


async def test_a_keeper_that_cannot_fill_the_memory_says_why(tmp_path: Path) -> None:
    class Sealed(SparseMaker):
        async def __call__(self, machine: Machine, folder: Path, groups: Sequence[str] = ()) -> Frozen:
            frozen = await super().__call__(machine, folder)
            fcntl.fcntl(frozen.memory["ram0"], fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
            return frozen

    templates = Templates(tmp_path, Sealed(), memory_mb=100, linger=0)
    with pytest.raises(SandboxError, match=r"memory cannot be filled: .*Operation not permitted"):
        await templates.get("one", MACHINE)
    assert list(tmp_path.glob("*")) == []
    await templates.close()
