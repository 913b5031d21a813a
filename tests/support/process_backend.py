"""Support for tests of the process backend: a folder for all users, the stand-in agent, and leftovers."""

import asyncio
import errno
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from hypercore_agents.compute.base import Sandbox
from hypercore_agents.compute.host.users import AgentUsers, closed_component
from hypercore_agents.compute.process import ProcessBackend, shim
from hypercore_agents.compute.process.records import ProcessDirectory, ProcessRecord
from hypercore_agents.compute.testing.conformance import Subject
from hypercore_agents.kit.linux.cgroups import Cgroups, detect
from support.descriptors import descriptors
from support.folders_in_use import entries_below
from support.sandboxes import failing_write

_subjects = itertools.count()


def users_for_a_test() -> range:
    """Return users that no agent of this machine and no other test has, in this run or a parallel one."""
    first = 1_950_000_000 + 1000 * (os.getpid() % 100_000) + 10 * (next(_subjects) % 100)
    return range(first, first + 10)


def python_for_others() -> str | None:
    """Return a Python that every user may run, None if there is none."""
    for candidate in (sys.executable, "/usr/bin/python3"):
        if Path(candidate).exists() and closed_component(Path(candidate)) is None:
            return candidate
    return None


def no_own_users() -> str | None:
    """Return what this host lacks for tests with a user per agent, None if nothing."""
    if os.geteuid() != 0:
        return "needs root"
    return None if python_for_others() else "needs a Python that other users may run"


def no_limits() -> str | None:
    """Return what this host lacks for tests of limits, None if nothing."""
    groups = detect()
    missing = {"cores", "memory", "pids"} - (groups.enforced if groups else frozenset())
    return f"needs writable control groups for {', '.join(sorted(missing))}" if missing else None


async def ask(sandbox: Sandbox, what: str, **more: Any) -> Any:
    """Let the stand-in agent execute an order, and return its answer."""
    host, port = sandbox.address.removeprefix("http://").split(":")
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(json.dumps({"do": what, **more}).encode() + b"\n")
            answer = json.loads(await reader.readline())
        finally:
            writer.close()
            await writer.wait_closed()
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["result"]


class ProcessSubject(Subject):
    """A process backend over a new directory, whose agents are stand-ins."""

    log_limit = 64 * 1024

    def __init__(self, *, own_users: bool = False, limits: bool = False, mode: str = "", **options: Any) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="hypercore-test-"))
        self.place.chmod(0o755)
        self.state = self.place / "state"
        self.claims = self.place / "uids"
        self.users = users_for_a_test()
        program = self.place / "agent.py"
        shutil.copy(Path(__file__).with_name("standin_agent.py"), program)
        # A symbolic link, which a test can break.
        self.python = self.place / "python3"
        self.python.symlink_to((python_for_others() if own_users else None) or sys.executable)
        self.options: dict[str, Any] = {
            "command": [str(self.python), "-I", str(program), *([mode] if mode else [])],
            "agent_uids": self.users if own_users else None,
            "uid_claims": self.claims,
            "enforce_limits": limits,
            "log_bytes": self.log_limit,
        } | options
        self.backend = self.successor()
        assert self.backend.capabilities.separates_agents is own_users, self.backend.capabilities.isolation

    def successor(self) -> ProcessBackend:
        return ProcessBackend(self.state, **self.options)

    def options_as_json(self) -> str:
        """Return the backend's options, with a range as its start and stop."""
        uids: range | None = self.options["agent_uids"]
        values = self.options | {"agent_uids": uids and [uids.start, uids.stop], "uid_claims": str(self.claims)}
        return json.dumps(values)

    async def end(self, sandbox: Sandbox, status: int) -> None:
        await ask(sandbox, "exit", status=status)

    async def print(self, sandbox: Sandbox, text: str, times: int = 1) -> None:
        await ask(sandbox, "print", text=text, times=times)

    def directory(self, sandbox: Sandbox) -> ProcessDirectory:
        return ProcessDirectory(self.state / "sandboxes" / sandbox.agent_id)

    def record(self, sandbox: Sandbox) -> ProcessRecord:
        record = self.directory(sandbox).read()
        assert record is not None
        return record

    def shim(self, sandbox: Sandbox) -> int:
        identity = self.record(sandbox).shim
        assert identity is not None
        return identity.pid

    def agent(self, sandbox: Sandbox) -> int:
        identity = self.record(sandbox).agent
        assert identity is not None
        return identity.pid

    def breakages(self) -> Mapping[str, Callable[[], AbstractContextManager[object]]]:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        bad_shim = self.place / "shim.py"
        steps: dict[str, Callable[[], AbstractContextManager[object]]] = {
            "directory": lambda: mock.patch.object(ProcessDirectory, "create", side_effect=full),
            "socket": lambda: mock.patch("socket.socket.listen", side_effect=full),
            "spawn": lambda: mock.patch("os.posix_spawn", side_effect=full),
            "shim ends at once": lambda: _replaced_shim(bad_shim, "raise SystemExit(0)"),
            "shim sends an invalid message": lambda: _replaced_shim(
                bad_shim, "import os; os.write(5, b'{}'); os.read(5, 1)"
            ),
            "log": _blocked_log,
            "program": lambda: _missing(self.python),
        }
        for write in range(self._writes()):
            steps[f"record, write {write + 1}"] = partial(failing_write, ProcessDirectory, write, full)
        if self.backend.capabilities.separates_agents:
            steps["user"] = lambda: mock.patch.object(AgentUsers, "claim", side_effect=full)
            steps["ownership"] = lambda: mock.patch.object(ProcessDirectory, "give_to", side_effect=full)
        groups = detect() if self.options["enforce_limits"] else None
        if groups:
            steps["group"] = lambda: mock.patch.object(Cgroups, "create", side_effect=full)
            steps["limit"] = lambda: mock.patch("hypercore_agents.kit.linux.cgroups._write", side_effect=full)
        return steps

    def residue(self) -> frozenset[str]:
        """Return all traces of the backend: processes, files, control groups, users and descriptors."""
        found = {str(path) for path in entries_below(self.place) if path.name not in ("sandboxes", "locks")}
        found -= {str(path) for path in (self.state, self.claims)}
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and self._is_ours(process):
                found.add(f"process {process.name}")
        scope = hashlib.sha256(os.fsencode(self.state / "sandboxes")).hexdigest()[:8]
        groups = map(str, entries_below(Path("/sys/fs/cgroup")))
        found.update(path for path in groups if f"/hypercore-{scope}-" in path)
        found |= {f"descriptor {number} of {target}" for number, target in descriptors()}
        return frozenset(
            name for name in found if "/proc/self/fd" not in name and f"/proc/{os.getpid()}/fd" not in name
        )

    def _writes(self) -> int:
        """Return how often a start writes the record: address, shim, agent, and user and groups if any."""
        own_user = self.backend.capabilities.separates_agents
        return 3 + own_user + bool(self.options["enforce_limits"] and detect())

    def _is_ours(self, process: Path) -> bool:
        try:
            marked = os.fsencode(self.place) in (process / "environ").read_bytes()
            return marked or int((process / "status").read_text().split("Uid:\t")[1].split()[0]) in self.users
        except (OSError, IndexError):
            return False

    async def close(self) -> None:
        """Stop all sandboxes, and remove the folder."""
        for sandbox in await self.backend.list():
            await self.backend.stop(sandbox.agent_id, grace=0)
        await self.backend.close()
        shutil.rmtree(self.place)


@contextmanager
def _blocked_log() -> Iterator[None]:
    """Put a directory in place of the shim's log."""
    create = ProcessDirectory.create

    def with_blocked_log(self: ProcessDirectory) -> None:
        create(self)
        self.log.mkdir()

    with mock.patch.object(ProcessDirectory, "create", with_blocked_log):
        yield


@contextmanager
def _replaced_shim(path: Path, program: str) -> Iterator[None]:
    path.write_text(program)
    with mock.patch.object(shim, "__file__", str(path)):
        yield
    path.unlink()


@contextmanager
def _missing(path: Path) -> Iterator[None]:
    hidden = path.with_name(f"{path.name}.hidden")
    path.rename(hidden)
    yield
    hidden.rename(path)
