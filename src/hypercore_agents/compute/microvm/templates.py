"""Templates: a booted VM that is nobody's yet, frozen, from which agents are cloned copy on write.

    <state_dir>/microvm/templates/<key>/
        template.json   who keeps it, its size, when it was last used (the file's time)
        socket          where its keeper hands out memory and state
        scratch         the scratch disk as the frozen VM had it

The key names all that a snapshot depends on: image, QEMU, accelerator, CPU, size, disk, kernel line. What was made by
another version is another key and is let go with the least recently used ones.

A template is made before any identity, key or request exists in the VM, with no listener at its gateway's address. Its
memory is in memfds that the keeper fills and seals once its VM has ended, so a clone can change its own copy only and
the template has its size for good. The memory is charged to a control group of the template's own (`template_groups`).

A template that no keeper keeps takes memory all the same while a clone of it runs. `lent` says which those are; they
count, and letting go of them frees nothing. While a template is made, it counts as the VM that it is.

One process makes a template while others wait for it (flock); making it goes on when the start that asked for it is
cancelled, since the next one will want it.

Rejected: a snapshot with the server enrolled (an identity for everybody); one per agent (nothing is shared).
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import structlog

from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.host.blocking_work import settled
from hypercore_agents.compute.host.identity import ProcessIdentity, held, identify, reap, send, wait_ended
from hypercore_agents.compute.microvm import template_holder
from hypercore_agents.compute.microvm.machine import Machine
from hypercore_agents.compute.microvm.shim_client import spawn
from hypercore_agents.compute.microvm.template_groups import TemplateGroups
from hypercore_agents.compute.microvm.template_memory import Account, Frozen, Template
from hypercore_agents.kit.linux.state_location import location_mark

_log = structlog.get_logger(__name__)

_ANSWER_SECONDS = 20.0
_FILL_SECONDS = 120.0
"""How long a keeper may take to fill the holes of a template's memory: a busy host needs a second for each gigabyte."""
_LOCK_PAUSE = 0.1
_MAKING = ".making-"
_END_SECONDS = 10.0
T = TypeVar("T")

Maker = Callable[[Machine, Path, Sequence[str]], Awaitable[Frozen]]
"""Boots a VM in a folder for its files and in control groups, and freezes it. Raises SandboxError."""


@dataclass(frozen=True)
class _Kept:
    """A template that is there, or is being made in `place` (then with the size of its VM)."""

    place: Path
    account: Account
    used_at: float

    @property
    def made(self) -> bool:
        return not self.place.name.startswith(_MAKING)


class Templates:
    """All templates of one state directory. Use it in one event loop."""

    def __init__(
        self,
        folder: Path,
        make: Maker,
        *,
        memory_mb: int,
        linger: float,
        end_on_close: bool = False,
        overhead_mb: int = 0,
        room: Callable[[], int] = lambda: 1 << 30,
        lent: Callable[[], Iterable[Account]] = tuple,
        groups: TemplateGroups | None = None,
    ) -> None:
        """Keep at most `memory_mb` of them, and each for `linger` seconds after its last lease.

        With `end_on_close`, or a `linger` of 0, `close` ends those that are held here. Without a close, when this
        process is killed, they linger for its successor.

        `overhead_mb` is what a VM takes beside its memory, `room` tells what the host has left (MB), `lent` the
        templates of running clones. Both may block.
        """
        self._folder = folder
        self._make = make
        self._memory_mb = memory_mb
        self._linger = linger
        self._end_on_close = end_on_close or not linger
        self._overhead_mb = overhead_mb
        self._room = room
        self._lent = lent
        self._groups = groups or TemplateGroups(None, "")
        self._held: dict[str, Template] = {}
        self._under_way: dict[str, asyncio.Task[Template | None]] = {}
        self._sizes: dict[str, int] = {}

    async def get(self, key: str, machine: Machine) -> Template | None:
        """Return the template, made if need be; None where this size is not kept or does not fit. SandboxError.

        Enter its `in_use` before anything is awaited.
        """
        if self._memory_mb <= 0:
            return None
        while True:
            template = self._held.get(key)
            if template is not None:
                if template.is_kept():
                    with contextlib.suppress(OSError):
                        os.utime(self._folder / key / "template.json")
                    return template
                self._held.pop(key).close()
            task = self._under_way.get(key)
            if task is None:
                task = asyncio.create_task(self._find_or_make(key, machine), name=f"template {key}")
                self._under_way[key] = task
                task.add_done_callback(lambda done: self._done(key, done))
            template = await asyncio.shield(task)
            if template is None or not template.closed:
                return template

    async def close(self) -> None:
        """Let go of all leases; templates that do not linger are gone afterwards."""
        for task in [*self._under_way.values()]:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, SandboxError):
                await task
        await asyncio.sleep(0)  # what was ready just now comes to what is held
        for template in self._held.values():
            template.close()
        held = [*self._held]
        self._held.clear()
        if self._end_on_close:
            await asyncio.to_thread(self._end_all, held)

    def usage_mb(self, *, making: bool = True) -> int:
        """Return the memory that templates take: those kept, those of running clones, and one that is being made."""
        return _total_mb([*(kept.account for kept in self._kept() if kept.made or making), *self._lent()])

    def charged_mb(self) -> int:
        """Return the memory that templates really take, by their control groups; by their size where they have none."""
        kept = self._kept()
        found = 0
        for entry in kept:
            charged = self._groups.charged_bytes(entry.place.name.removeprefix(_MAKING))
            found += entry.account.size_mb << 20 if charged is None else charged
        named = {entry.account.instance for entry in kept}
        unkept_mb = _total_mb(account for account in self._lent() if account.instance not in named)
        return unkept_mb + -(-found // (1 << 20))

    async def give_back(self, wanted_mb: int, key: str) -> None:
        """Let go of templates until `wanted_mb` are free or no more can be freed, the one of `key` last."""
        await _to_its_end(self._let_go, wanted_mb, key)
        self._close_unkept()

    def _done(self, key: str, task: asyncio.Task[Template | None]) -> None:
        self._under_way.pop(key, None)
        if not task.cancelled() and task.exception() is None:
            template = task.result()
            if template is not None:
                self._held[key] = template

    async def _find_or_make(self, key: str, machine: Machine) -> Template | None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One at a time for all: whoever makes one uses all the host's processors anyway, and nothing stays behind.
        lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(_LOCK_PAUSE)
            found = await self._lease(key)
            if found is None and await asyncio.to_thread(self._may_make, key, machine):
                found = await self._make_it(key, machine)
            return found
        finally:
            os.close(lock)

    async def _lease(self, key: str) -> Template | None:
        """Find in a thread; a lease that nobody waits for any more is given back."""
        finding = asyncio.ensure_future(asyncio.to_thread(self._find, key))
        try:
            return await asyncio.shield(finding)
        except asyncio.CancelledError:
            await settled(finding)
            if finding.exception() is None and (template := finding.result()) is not None:
                template.close()
            raise

    def _may_make(self, key: str, machine: Machine) -> bool:
        """Say whether there is room for the VM that becomes the template, and for the template beside a clone."""
        vm_mb, room_mb = machine.memory_mb + self._overhead_mb, self._room()
        size_mb = self._sizes.get(key, 0)
        lent_mb = _total_mb(self._lent())
        if room_mb >= vm_mb + size_mb and lent_mb + size_mb <= self._memory_mb:
            return True
        _log.info("microvm.template_not_made", room_mb=room_mb, vm_mb=vm_mb, size_mb=size_mb, lent_mb=lent_mb)
        return False

    def _find(self, key: str) -> Template | None:
        """Return a lease of a template that is kept; remove what a dead keeper left."""
        place = self._folder / key
        lease = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lease.settimeout(_ANSWER_SECONDS)
        descriptors: list[int] = []
        try:
            # By a short name: a socket's path has at most 107 bytes.
            folder = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                lease.connect(f"/proc/self/fd/{folder}/socket")
            finally:
                os.close(folder)
            message, descriptors = template_holder.receive_descriptors(lease, template_holder.MOST_DESCRIPTORS)
            told = json.loads(message)
            state, *blocks = descriptors
            memory = dict(zip(told["blocks"], blocks, strict=True))
            account = Account(told["instance"], told["size_mb"])
        except (OSError, ValueError, KeyError):
            lease.close()
            for descriptor in descriptors:
                os.close(descriptor)
            shutil.rmtree(place, ignore_errors=True)
            self._groups.remove(key)
            return None
        lease.settimeout(None)
        return Template(key, account, memory, state, place / "scratch", lease)

    async def _make_it(self, key: str, machine: Machine) -> Template | None:
        started = time.monotonic()
        work = self._folder / f"{_MAKING}{key}"
        try:
            groups = await _to_its_end(self._begin_making, work, key, machine)
            frozen = await self._make(machine, work, groups)
            try:
                size_mb = -(-frozen.drop_untouched() // (1 << 20))
                self._sizes[key] = size_mb
                if not await asyncio.to_thread(self._make_room, size_mb):
                    _log.warning("microvm.template_too_large", size_mb=size_mb, template_memory_mb=self._memory_mb)
                    return None
                self._close_unkept()
                account = Account(secrets.token_hex(8), size_mb)
                await _to_its_end(self._hand_over, key, machine, frozen, account)
            finally:
                frozen.close()
        finally:
            await _to_its_end(_remove, work)
            if not (self._folder / key).exists():
                await _to_its_end(self._groups.remove, key)
        _log.info("microvm.template_made", key=key, size_mb=size_mb, seconds=round(time.monotonic() - started, 2))
        return await self._lease(key)

    def _begin_making(self, work: Path, key: str, machine: Machine) -> tuple[str, ...]:
        """Make the folder and the control group, and say in the folder what the VM takes; return the group.

        Whoever holds the lock removes what others left. Raises SandboxError.
        """
        for left in self._folder.glob(f"{_MAKING}*"):
            self._groups.remove(left.name.removeprefix(_MAKING))
            _remove(left)
        work.mkdir(mode=0o700)
        size_mb = machine.memory_mb + self._overhead_mb
        _describe(work, identify(os.getpid()), Account("", size_mb), machine)
        try:
            return self._groups.create(key, size_mb)
        except OSError as error:
            raise SandboxError(f"cannot make the control group of a template: {error}") from error

    def _hand_over(self, key: str, machine: Machine, frozen: Frozen, account: Account) -> None:
        """Start the keeper, and give the template its name last."""
        place = self._folder / key
        place.mkdir(mode=0o700)
        try:
            frozen.scratch.rename(place / "scratch")
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with ours, theirs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                folder = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    listener.bind(f"/proc/self/fd/{folder}/socket")
                finally:
                    os.close(folder)
                listener.listen(64)
                identity = spawn(template_holder.PROGRAM, key, theirs.fileno())
                theirs.close()
                ours.settimeout(_FILL_SECONDS)
                told = {"blocks": [*frozen.memory], "instance": account.instance, "size_mb": account.size_mb}
                order = json.dumps(
                    {
                        "folder": str(place),
                        "linger": self._linger,
                        "lease": told,
                        "groups": self._groups.paths(key),
                    }
                ).encode()
                descriptors = [listener.fileno(), frozen.state, *frozen.memory.values()]
                template_holder.send_descriptors(ours, order, descriptors)
                _describe(place, identity, account, machine)
                answer = ours.recv(1024)
                if answer != b"kept":
                    why = answer.decode(errors="replace") or "it ended at once"
                    raise SandboxError(f"a template's keeper did not start: {why}")
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise

    def _make_room(self, wanted_mb: int) -> bool:
        """End the templates that were not used for longest until there is room; say whether there is."""
        if wanted_mb + _total_mb(self._lent()) > self._memory_mb:
            return False
        over_mb = self.usage_mb(making=False) + wanted_mb - self._memory_mb
        return self._let_go(over_mb, "") >= over_mb

    def _let_go(self, wanted_mb: int, last: str) -> int:
        """End templates of which no clone runs, the least recently used first and `last` last; return what it freed."""
        lent = {account.instance for account in self._lent()}
        freed_mb = 0
        kept = [entry for entry in self._kept() if entry.made and entry.account.instance not in lent]
        for entry in sorted(kept, key=lambda entry: (entry.place.name == last, entry.used_at)):
            if freed_mb >= wanted_mb:
                break
            _log.info("microvm.template_let_go", key=entry.place.name, size_mb=entry.account.size_mb)
            self._end(entry.place)
            freed_mb += entry.account.size_mb
        return freed_mb

    def _close_unkept(self) -> None:
        """Close the leases of templates that were ended: their memory is free once nobody has it open."""
        for key, template in [*self._held.items()]:
            if not template.is_kept():
                self._held.pop(key).close()

    def _end_all(self, keys: list[str]) -> None:
        for key in keys:
            self._end(self._folder / key)

    def _kept(self) -> list[_Kept]:
        """Return every template whose keeper, or maker, lives; remove what a dead keeper left."""
        found = []
        for description in self._folder.glob("*/template.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                told = json.loads(description.read_text())
                account = Account(str(told["instance"]), int(told["size_mb"]))
                entry = _Kept(description.parent, account, description.stat().st_mtime)
                with held(_keeper_of(entry.place)) as alive:
                    if alive is not None:
                        found.append(entry)
                    elif entry.made:
                        self._end(entry.place)
        return found

    def _end(self, place: Path) -> None:
        """End a template's keeper; remove the folder and the control group."""
        _end_keeper(place)
        shutil.rmtree(place, ignore_errors=True)
        self._groups.remove(place.name)


def _describe(place: Path, keeper: ProcessIdentity | None, account: Account, machine: Machine) -> None:
    """Write who keeps or makes a template, and what it takes."""
    told = {
        "keeper": keeper and keeper.to_json(),
        **asdict(account),
        "machine": asdict(machine),
        "origin": location_mark(place.parent),
    }
    fresh = place / "template.new"
    fresh.write_text(json.dumps(told, default=str))
    fresh.replace(place / "template.json")


def _total_mb(accounts: Iterable[Account]) -> int:
    """Return what templates take together, each counted once."""
    return sum({account.instance: account.size_mb for account in accounts}.values())


async def _to_its_end(work: Callable[..., T], *arguments: object) -> T:
    """Run in a thread; a caller that is cancelled waits for the end, since it undoes what the thread works with."""
    done = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        await settled(done)
        raise


def template_key(image_id: str, machine: Machine, scratch_mb: int, qemu: str, cpu: str) -> str:
    """Return the name of the template that fits all of this. `qemu` and `cpu` name versions and models."""
    # The clock's frequency is measured anew by every process; a clone takes its template's.
    alike = replace(machine, tsc_khz=machine.tsc_khz and 1)
    parts: list[Any] = [image_id, alike.arguments("template"), scratch_mb, qemu, cpu]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _keeper_of(place: Path) -> ProcessIdentity | None:
    """Return a template's keeper; None in a copied folder, whose keeper is the original's. OSError, ValueError."""
    description = json.loads((place / "template.json").read_text())
    here = location_mark(place.parent)
    return ProcessIdentity.from_json(description.get("keeper")) if description.get("origin", here) == here else None


def _end_keeper(place: Path) -> None:
    """End a template's keeper, unless the folder is a copy."""
    with contextlib.suppress(OSError, ValueError):
        identity = _keeper_of(place)
        with held(identity) as pidfd:
            if pidfd is not None:
                send(pidfd, signal.SIGTERM)
                wait_ended(pidfd, _END_SECONDS)
        reap(identity)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
