"""Memory accounting of microVMs: every page is charged once, to its owner, and a clone can use all of its memory."""

import asyncio
import os
from pathlib import Path

import pytest

from hypercore_agents.compute.base import Sandbox, SandboxState
from hypercore_agents.compute.host.shims import memory_kills
from hypercore_agents.compute.microvm.template_memory import Template
from support.microvm_backend import MicrovmSubject, ask

pytestmark = pytest.mark.timeout(300)  # it writes all of a translated guest's memory, twice

MEMORY_MB = 512
PROGRAM_MB = 12
"""Pages of a program, and of a template's holder, are charged to the group that touched them first."""
AVAILABLE_KB = "$(sed -n 's/MemAvailable: *\\([0-9]*\\).*/\\1/p' /proc/meminfo)"
FILL = (
    f"mkdir /fill; mount -t tmpfs -o size=100% none /fill; left=$(({AVAILABLE_KB} / 1024 - 24)); "
    "dd if=/dev/zero of=/fill/all bs=1M count=$left 2>&1; echo filled $left"
)


def template_of(subject: MicrovmSubject) -> Template:
    (template,) = subject.backend._templates._leased.values()  # type: ignore[attr-defined]
    assert isinstance(template, Template)
    return template


def taken_mb(template: Template) -> int:
    blocks = sum(os.fstat(part).st_blocks for part in (*template.memory.values(), template.state))
    return -(-blocks * 512 // (1 << 20))


def charged_mb(subject: MicrovmSubject, sandbox: Sandbox) -> float:
    """Return the memory that the VM's control group is charged with."""
    for group in subject.record(sandbox).cgroups:
        for name in ("memory.usage_in_bytes", "memory.current"):
            if Path(group, name).exists():
                return int(Path(group, name).read_text()) / (1 << 20)
    pytest.skip("needs a control group for memory")


def template_group_mb(subject: MicrovmSubject, template: Template) -> float:
    """Return the memory without file cache that the template's control group is charged with."""
    charged = subject.backend._template_groups.charged_bytes(template.key)  # type: ignore[attr-defined]
    if charged is None:
        pytest.skip("needs a control group for memory")
    return int(charged) / (1 << 20)


def own_mb(subject: MicrovmSubject, sandbox: Sandbox) -> float:
    """Return the private memory of the VM's QEMU with its page tables, without the template's pages."""
    machine = subject.record(sandbox).machine
    assert machine is not None
    lines = Path(f"/proc/{machine.pid}/smaps_rollup").read_text().splitlines()[1:]
    lines += Path(f"/proc/{machine.pid}/status").read_text().splitlines()
    wanted = ("Anonymous:", "VmPTE:")
    return sum(int(line.split()[1]) for line in lines if line.startswith(wanted)) / 1024


async def test_a_clone_that_touches_all_of_its_memory_lives_and_pays_once(subject: MicrovmSubject) -> None:
    clone, neighbour = await asyncio.gather(*(subject.backend.start(subject.request()) for _ in range(2)))
    template = template_of(subject)
    before_mb = taken_mb(template)
    # Twice, since the first file may use pages that the template already has.
    for _ in range(2):
        said = await ask(clone, FILL, seconds=240)
        filled_mb = int(said.split("filled ")[1])
        assert filled_mb > MEMORY_MB * 0.7, said
        assert "No space left" not in said
        assert "alive" in await ask(clone, "umount /fill; rmdir /fill; echo alive")
    running = await subject.backend.inspect(clone.agent_id)
    assert running is not None
    assert running.state == SandboxState.RUNNING
    assert memory_kills([*subject.record(clone).cgroups]) == 0
    assert MEMORY_MB * 0.7 < charged_mb(subject, clone) <= MEMORY_MB + 256
    for sandbox in (clone, neighbour):
        # The pages of QEMU's program, a few MB, are charged to the group that touched them first.
        assert charged_mb(subject, sandbox) == pytest.approx(own_mb(subject, sandbox), rel=0.05, abs=6)
    # The template has not changed, and has the size that is accounted for it.
    assert taken_mb(template) == before_mb == template.instance.size_mb
    assert before_mb < MEMORY_MB * 0.5
    # Its group is charged with all of it, and no other group is: the kernel charges a page once.
    charged = template_group_mb(subject, template)
    assert charged == pytest.approx(before_mb, rel=0.05, abs=PROGRAM_MB)
    usage = await subject.backend.usage()
    assert usage is not None
    assert usage.memory_used_mb == 2 * (MEMORY_MB + 256) + before_mb
    # The used memory in `stats` is the memory that the groups are charged with.
    assert usage.templates_memory is not None
    assert (usage.templates_memory.given_mb, usage.agents_memory[clone.agent_id].given_mb) == (before_mb, 768)
    assert usage.templates_memory.charged_mb == pytest.approx(before_mb, rel=0.05, abs=PROGRAM_MB)
    for sandbox in (clone, neighbour):
        counted_mb = usage.agents_memory[sandbox.agent_id].charged_mb
        assert counted_mb == pytest.approx(own_mb(subject, sandbox), rel=0.05, abs=PROGRAM_MB)
    assert usage.memory_charged_mb == usage.templates_memory.charged_mb + sum(
        account.charged_mb for account in usage.agents_memory.values()
    )
    assert "alive" in await ask(neighbour, "echo alive")
