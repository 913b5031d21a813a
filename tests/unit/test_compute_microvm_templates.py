"""How templates are kept, without a VM: what makes one is a function of the test."""

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.microvm.machine import Machine
from hypercore_agents.compute.microvm.templates import Frozen, Template, Templates
from hypercore_agents.compute.testing.conformance import eventually

MACHINE = Machine(Path("/usr/bin/true"), "tcg", 1, 512, None)


class Maker:
    """Makes templates of one megabyte."""

    def __init__(self) -> None:
        self.made = 0
        self.failure: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, machine: Machine, folder: Path) -> Frozen:
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.made += 1
        memory, state = (os.memfd_create(name, os.MFD_ALLOW_SEALING) for name in ("memory", "state"))
        os.write(memory, bytes([self.made]) * (1 << 20))
        (folder / "scratch").write_bytes(b"disk")
        return Frozen(memory, state, folder / "scratch")


def content(template: Template | None) -> int:
    assert template is not None
    assert template.scratch.read_bytes() == b"disk"
    return os.pread(template.memory, 1, 0)[0]


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


async def test_it_goes_by_itself_when_nobody_wants_it(tmp_path: Path) -> None:
    templates = Templates(tmp_path, Maker(), memory_mb=100, linger=0.2)
    await templates.get("one", MACHINE)
    await templates.close()
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
        async def __call__(self, machine: Machine, folder: Path) -> Frozen:
            frozen = await super().__call__(machine, folder)
            os.write(frozen.memory, bytes(2 << 20))
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
    import json
    import signal

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
    for descriptor in (template.memory, template.state):
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
    before = len(os.listdir("/proc/self/fd"))
    getting = asyncio.create_task(second.get("one", MACHINE))
    await asyncio.to_thread(found.wait, 20)
    closing = asyncio.create_task(second.close())
    await asyncio.sleep(0)
    go_on.set()
    await closing
    with pytest.raises(asyncio.CancelledError):
        await getting
    assert len(os.listdir("/proc/self/fd")) == before
    first._linger = 0
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
