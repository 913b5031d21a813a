"""Templates: a booted VM that is nobody's yet, frozen, from which agents are cloned copy on write.

    <state_dir>/microvm/templates/<key>/
        template.json   who keeps it, its size, when it was last used (the file's time)
        socket          where its keeper hands out memory and state
        scratch         the scratch disk as the frozen VM had it

The key names all that a snapshot depends on: image, QEMU, accelerator, CPU, size, disk, kernel line. What was made by
another version is another key and is let go with the least recently used ones.

A template is made before any identity, key or request exists in the VM, with no listener at its gateway's address. Its
memory is a memfd that is sealed against writing once its VM has ended, so a clone can change its own copy only.

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
import shutil
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.host.identity import ProcessIdentity, held, reap, send, wait_ended
from hypercore_agents.compute.host.work import settled
from hypercore_agents.compute.microvm import keeper
from hypercore_agents.compute.microvm.link import spawn
from hypercore_agents.compute.microvm.machine import Machine
from hypercore_agents.kit.origin import mark_of

_log = structlog.get_logger(__name__)

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_ANSWER_SECONDS = 20.0
_LOCK_PAUSE = 0.1
_END_SECONDS = 10.0


@dataclass(frozen=True)
class Template:
    """A template that this process holds a lease of. `memory` and `state` are sealed memfds."""

    key: str
    memory: int
    state: int
    scratch: Path
    lease: socket.socket

    def is_kept(self) -> bool:
        """Say whether the keeper still keeps it; the descriptors are good in any case."""
        try:
            return self.lease.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """Let go of it."""
        self.lease.close()
        for descriptor in (self.memory, self.state):
            os.close(descriptor)


@dataclass(frozen=True)
class Frozen:
    """What making a template brings: its memory and state, not sealed yet, and its disk."""

    memory: int
    state: int
    scratch: Path


Maker = Callable[[Machine, Path], Awaitable[Frozen]]
"""Boots a VM in a folder for its files, and freezes it. Raises SandboxError."""


class Templates:
    """All templates of one state directory. Use it in one event loop."""

    def __init__(self, folder: Path, make: Maker, *, memory_mb: int, linger: float) -> None:
        """Keep at most `memory_mb` of them, and each for `linger` seconds after its last lease."""
        self._folder = folder
        self._make = make
        self._memory_mb = memory_mb
        self._linger = linger
        self._held: dict[str, Template] = {}
        self._under_way: dict[str, asyncio.Task[Template | None]] = {}

    async def get(self, key: str, machine: Machine) -> Template | None:
        """Return the template, made if need be; None when templates of this size are not kept here. SandboxError."""
        if self._memory_mb <= 0:
            return None
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
        return await asyncio.shield(task)

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
        if not self._linger:
            await asyncio.to_thread(self._end_all, held)

    def usage_mb(self) -> int:
        """Return the memory that templates take."""
        return sum(size for _, size, _ in self._kept())

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
            return await self._lease(key) or await self._make_it(key, machine)
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

    def _find(self, key: str) -> Template | None:
        """Return a lease of a template that is kept; remove what a dead keeper left."""
        place = self._folder / key
        lease = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lease.settimeout(_ANSWER_SECONDS)
        try:
            # By a short name: a socket's path has at most 107 bytes.
            folder = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                lease.connect(f"/proc/self/fd/{folder}/socket")
            finally:
                os.close(folder)
            _, descriptors = keeper.receive_descriptors(lease, 2)
            memory, state = descriptors
        except (OSError, ValueError):
            lease.close()
            shutil.rmtree(place, ignore_errors=True)
            return None
        lease.settimeout(None)
        return Template(key, memory, state, place / "scratch", lease)

    async def _make_it(self, key: str, machine: Machine) -> Template | None:
        started = time.monotonic()
        work = self._folder / f".making-{key}"
        await _to_its_end(_remove, work)
        work.mkdir(mode=0o700)
        try:
            frozen = await self._make(machine, work)
            try:
                for descriptor in (frozen.memory, frozen.state):
                    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
                size_mb = _size_mb(frozen)
                if size_mb > self._memory_mb:
                    _log.warning("microvm.template_too_large", size_mb=size_mb, template_memory_mb=self._memory_mb)
                    return None
                await _to_its_end(self._make_room, size_mb)
                await _to_its_end(self._hand_over, key, machine, frozen, size_mb)
            finally:
                os.close(frozen.memory)
                os.close(frozen.state)
        finally:
            await _to_its_end(_remove, work)
        _log.info("microvm.template_made", key=key, size_mb=size_mb, seconds=round(time.monotonic() - started, 2))
        return await self._lease(key)

    def _hand_over(self, key: str, machine: Machine, frozen: Frozen, size_mb: int) -> None:
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
                identity = spawn(keeper.PROGRAM, key, theirs.fileno())
                theirs.close()
                ours.settimeout(_ANSWER_SECONDS)
                order = json.dumps({"folder": str(place), "linger": self._linger}).encode()
                keeper.send_descriptors(ours, order, [listener.fileno(), frozen.memory, frozen.state])
                description = {
                    "keeper": identity.to_json(),
                    "size_mb": size_mb,
                    "machine": asdict(machine),
                    "origin": mark_of(self._folder),
                }
                (place / "template.json").write_text(json.dumps(description, default=str))
                if ours.recv(16) != b"kept":
                    raise SandboxError("a template's keeper ended at once")
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise

    def _make_room(self, wanted_mb: int) -> None:
        """End the templates that were not used for longest, until there is room."""
        kept = sorted(self._kept(), key=lambda entry: entry[2])
        used = sum(size for _, size, _ in kept)
        for place, size, _ in kept:
            if used + wanted_mb <= self._memory_mb:
                return
            _log.info("microvm.template_let_go", key=place.name, size_mb=size)
            _end(place)
            used -= size

    def _end_all(self, keys: list[str]) -> None:
        for key in keys:
            _end(self._folder / key)

    def _kept(self) -> list[tuple[Path, int, float]]:
        """Return folder, size and time of last use of every template that is there."""
        found = []
        for description in self._folder.glob("*/template.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                size = int(json.loads(description.read_text())["size_mb"])
                found.append((description.parent, size, description.stat().st_mtime))
        return found


async def _to_its_end(work: Callable[..., None], *arguments: object) -> None:
    """Run in a thread; a caller that is cancelled waits for the end, since it undoes what the thread works with."""
    done = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        await asyncio.shield(done)
    except asyncio.CancelledError:
        await settled(done)
        raise


def template_key(image_id: str, machine: Machine, scratch_mb: int, qemu: str, cpu: str) -> str:
    """Return the name of the template that fits all of this. `qemu` and `cpu` name versions and models."""
    # The clock's frequency is measured anew by every process; a clone takes its template's.
    alike = replace(machine, tsc_khz=machine.tsc_khz and 1)
    parts: list[Any] = [image_id, alike.arguments("template"), scratch_mb, qemu, cpu]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _size_mb(frozen: Frozen) -> int:
    taken = sum(os.fstat(descriptor).st_blocks * 512 for descriptor in (frozen.memory, frozen.state))
    return -(-taken // (1 << 20))


def _end(place: Path) -> None:
    """End a template's keeper, which removes the folder; remove it if that is gone already.

    The keeper of a copied folder is the original's, and left alone.
    """
    with contextlib.suppress(OSError, ValueError, KeyError):
        description = json.loads((place / "template.json").read_text())
        here = mark_of(place.parent)
        identity = ProcessIdentity.from_json(description["keeper"]) if description.get("origin", here) == here else None
        with held(identity) as pidfd:
            if pidfd is not None:
                send(pidfd, signal.SIGTERM)
                wait_ended(pidfd, _END_SECONDS)
        reap(identity)
    shutil.rmtree(place, ignore_errors=True)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
