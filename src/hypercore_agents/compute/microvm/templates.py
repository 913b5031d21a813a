"""Templates: snapshots of booted VMs without an identity, from which agents are cloned copy on write.

A template's key names everything that its snapshot depends on: image, QEMU, accelerator, CPU, size, disk and kernel
command line. Templates of other versions have other keys, and are evicted as the least recently used ones.

A template is created before any identity, key or request exists in the VM, and without a listener at the gateway's
address. Its memory is in memfds, which its holder fills and seals once the VM has ended: a clone can change only its
own copy, and the size of the template is final. A control group of the template is charged with the memory
(`template_groups`).

The memory of a template whose holder has ended stays in use while one of its clones runs. Such templates count, and
evicting them would free nothing. While a template is being created, it counts with the size of its VM.

One process creates a template while others wait for it (flock). The creation continues if the start that requested it
is cancelled, because the next start will need the template.

Rejected: a snapshot of an enrolled server (all clones would share one identity); a snapshot per agent (nothing would be
shared).
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import structlog

from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.host.blocking_work import finish, wait_until_done
from hypercore_agents.compute.host.identity import identify
from hypercore_agents.compute.microvm import template_leases
from hypercore_agents.compute.microvm.machine import Machine
from hypercore_agents.compute.microvm.template_folder import TemplateFolder, describe
from hypercore_agents.compute.microvm.template_groups import TemplateGroups
from hypercore_agents.compute.microvm.template_memory import Snapshot, Template, TemplateInstance, total_mb

_log = structlog.get_logger(__name__)

_LOCK_PAUSE = 0.1
T = TypeVar("T")

Creator = Callable[[Machine, Path, Sequence[str]], Awaitable[Snapshot]]
"""Boots a VM, with its files in a folder and in control groups, and returns its snapshot. Raises SandboxError."""


class Templates:
    """All templates of one state directory. Use it in one event loop."""

    def __init__(
        self,
        folder: Path,
        create: Creator,
        *,
        memory_mb: int,
        linger: float,
        end_on_close: bool = False,
        overhead_mb: int = 0,
        available_mb: Callable[[], int] = lambda: 1 << 30,
        instances_in_use: Callable[[], Iterable[TemplateInstance]] = tuple,
        groups: TemplateGroups | None = None,
    ) -> None:
        """Hold at most `memory_mb` of templates, each until `linger` seconds after its last lease.

        With `end_on_close`, or a `linger` of 0, `close` ends the templates that this object has leases of. If this
        process is killed instead, they linger for its successor.

        `overhead_mb` is the memory that a VM takes besides its own. `available_mb` returns the host's available memory,
        `instances_in_use` the template instances of running clones. Both may block.
        """
        self._folder = TemplateFolder(folder, groups or TemplateGroups(None, ""))
        self._create = create
        self._memory_mb = memory_mb
        self._linger = linger
        self._end_on_close = end_on_close or not linger
        self._overhead_mb = overhead_mb
        self._available_mb = available_mb
        self._instances_in_use = instances_in_use
        self._leased: dict[str, Template] = {}
        self._pending: dict[str, asyncio.Task[Template | None]] = {}
        self._sizes: dict[str, int] = {}

    async def get(self, key: str, machine: Machine) -> Template | None:
        """Return the template, creating it if necessary; None if it does not fit. Raises SandboxError.

        Enter its `in_use` before awaiting anything else.
        """
        if self._memory_mb <= 0:
            return None
        while True:
            template = self._leased.get(key)
            if template is not None:
                if template.has_holder():
                    self._folder.touch(key)
                    return template
                self._leased.pop(key).close()
            task = self._pending.get(key)
            if task is None:
                task = asyncio.create_task(self._find_or_create(key, machine), name=f"template {key}")
                self._pending[key] = task
                task.add_done_callback(lambda done: self._done(key, done))
            template = await asyncio.shield(task)
            if template is None or not template.closed:
                return template

    async def close(self) -> None:
        """Release all leases, and end the templates that do not linger."""
        for task in [*self._pending.values()]:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, SandboxError):
                await task
        await asyncio.sleep(0)  # lets `_done` store a template that has just become ready
        for template in self._leased.values():
            template.close()
        leased = [*self._leased]
        self._leased.clear()
        if self._end_on_close:
            await asyncio.to_thread(self.end_all, leased)

    def end_all(self, keys: Iterable[str]) -> None:
        """End templates. Blocks."""
        for key in keys:
            self._folder.end(key)

    def usage_mb(self, *, include_unfinished: bool = True) -> int:
        """Return the memory of all templates: existing ones, those of running clones, and the one being created."""
        existing = (entry.instance for entry in self._folder.entries() if entry.created or include_unfinished)
        return total_mb([*existing, *self._instances_in_use()])

    def charged_mb(self) -> int:
        """Return the memory that templates really take, by their control groups, or by their size without groups."""
        entries = self._folder.entries()
        charged_bytes = 0
        for entry in entries:
            charged = self._folder.groups.charged_bytes(entry.key)
            charged_bytes += entry.instance.size_mb << 20 if charged is None else charged
        names = {entry.instance.name for entry in entries}
        without_holder_mb = total_mb(instance for instance in self._instances_in_use() if instance.name not in names)
        return without_holder_mb + -(-charged_bytes // (1 << 20))

    async def free_memory(self, wanted_mb: int, key: str) -> None:
        """Evict templates until `wanted_mb` are free or no more can be freed, the one of `key` last."""
        await _in_thread(self._evict, wanted_mb, key)
        self._close_evicted()

    def _done(self, key: str, task: asyncio.Task[Template | None]) -> None:
        self._pending.pop(key, None)
        if not task.cancelled() and task.exception() is None:
            template = task.result()
            if template is not None:
                self._leased[key] = template

    async def _find_or_create(self, key: str, machine: Machine) -> Template | None:
        self._folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One lock for all keys: a creation uses all processors of the host anyway. The lock leaves no file behind.
        lock = os.open(self._folder.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(_LOCK_PAUSE)
            found = await self._lease(key)
            if found is None and await asyncio.to_thread(self._fits, key, machine):
                found = await self._create_template(key, machine)
            return found
        finally:
            os.close(lock)

    async def _lease(self, key: str) -> Template | None:
        """Take a lease in a thread; release it if the caller is cancelled."""
        work = asyncio.ensure_future(asyncio.to_thread(self._find, key))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await wait_until_done(work)
            if work.exception() is None and (template := work.result()) is not None:
                template.close()
            raise

    def _find(self, key: str) -> Template | None:
        """Return a lease of a template; remove the leftovers of a dead holder."""
        path = self._folder.template(key)
        template = template_leases.lease(path)
        if template is None:
            shutil.rmtree(path, ignore_errors=True)
            self._folder.groups.remove(key)
        return template

    def _fits(self, key: str, machine: Machine) -> bool:
        """Return whether the host has memory for the VM of the snapshot, and for the template beside a clone."""
        vm_mb, available_mb = machine.memory_mb + self._overhead_mb, self._available_mb()
        size_mb = self._sizes.get(key, 0)
        in_use_mb = total_mb(self._instances_in_use())
        if available_mb >= vm_mb + size_mb and in_use_mb + size_mb <= self._memory_mb:
            return True
        _log.info(
            "microvm.template_not_made", available_mb=available_mb, vm_mb=vm_mb, size_mb=size_mb, in_use_mb=in_use_mb
        )
        return False

    async def _create_template(self, key: str, machine: Machine) -> Template | None:
        started = time.monotonic()
        work = self._folder.creation(key)
        try:
            groups = await _in_thread(self._prepare_creation, work, key, machine)
            snapshot = await self._create(machine, work, groups)
            try:
                size_mb = -(-snapshot.drop_untouched() // (1 << 20))
                self._sizes[key] = size_mb
                if not await asyncio.to_thread(self._evict_for, size_mb):
                    _log.warning("microvm.template_too_large", size_mb=size_mb, template_memory_mb=self._memory_mb)
                    return None
                self._close_evicted()
                instance = TemplateInstance(secrets.token_hex(8), size_mb)
                await _in_thread(self._start_holder, key, machine, snapshot, instance)
            finally:
                snapshot.close()
        finally:
            await _in_thread(_remove, work)
            if not self._folder.template(key).exists():
                await _in_thread(self._folder.groups.remove, key)
        _log.info("microvm.template_made", key=key, size_mb=size_mb, seconds=round(time.monotonic() - started, 2))
        return await self._lease(key)

    def _prepare_creation(self, work: Path, key: str, machine: Machine) -> tuple[str, ...]:
        """Create the folder, which counts the VM's memory, and the control group; return the group.

        The caller holds the lock, so leftovers of others are removed. Raises SandboxError.
        """
        self._folder.remove_unfinished()
        work.mkdir(mode=0o700)
        size_mb = machine.memory_mb + self._overhead_mb
        describe(work, identify(os.getpid()), TemplateInstance("", size_mb), machine)
        try:
            return self._folder.groups.create(key, size_mb)
        except OSError as error:
            raise SandboxError(f"cannot create the control group of a template: {error}") from error

    def _start_holder(self, key: str, machine: Machine, snapshot: Snapshot, instance: TemplateInstance) -> None:
        groups = self._folder.groups.paths(key)
        path = self._folder.template(key)
        template_leases.start_holder(path, snapshot, instance, machine, groups=groups, linger=self._linger)

    def _evict_for(self, wanted_mb: int) -> bool:
        """Evict templates until one of `wanted_mb` fits; return whether it fits."""
        if wanted_mb + total_mb(self._instances_in_use()) > self._memory_mb:
            return False
        over_mb = self.usage_mb(include_unfinished=False) + wanted_mb - self._memory_mb
        return self._evict(over_mb, "") >= over_mb

    def _evict(self, wanted_mb: int, last: str) -> int:
        """End templates without running clones, least recently used first and `last` last; return the freed memory."""
        in_use = {instance.name for instance in self._instances_in_use()}
        freed_mb = 0
        unused = [entry for entry in self._folder.entries() if entry.created and entry.instance.name not in in_use]
        for entry in sorted(unused, key=lambda entry: (entry.key == last, entry.used_at)):
            if freed_mb >= wanted_mb:
                break
            _log.info("microvm.template_evicted", key=entry.key, size_mb=entry.instance.size_mb)
            self._folder.end(entry.key)
            freed_mb += entry.instance.size_mb
        return freed_mb

    def _close_evicted(self) -> None:
        """Close the leases of evicted templates: their memory is freed once no process has it open."""
        for key, template in [*self._leased.items()]:
            if not template.has_holder():
                self._leased.pop(key).close()


def template_key(image_id: str, machine: Machine, scratch_mb: int, qemu: str, cpu: str) -> str:
    """Return the key of the template for all of these. `qemu` and `cpu` name a version and a model."""
    # Every process measures the clock's frequency again, and a clone takes its template's: it must not change the key.
    comparable = replace(machine, tsc_khz=machine.tsc_khz and 1)
    parts: list[Any] = [image_id, comparable.arguments("template"), scratch_mb, qemu, cpu]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


async def _in_thread(work: Callable[..., T], *arguments: object) -> T:
    """Run work in a thread. A cancelled caller waits for its end, because it will undo the work's effects."""
    return await finish(asyncio.ensure_future(asyncio.to_thread(work, *arguments)))


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
