"""Child processes inherit only the descriptors that they need. Checked by kind, not by number."""

import contextlib
import ctypes
import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hypercore_agents
from hypercore_agents.api.ids import new_session_id
from hypercore_agents.compute.host.identity import ProcessIdentity
from support.agent_server import launched
from support.descriptors import descriptors
from support.isolation_marks import needs_isolation
from support.microvm_backend import MicrovmSubject, Place

_PIDFD_GETFD = 438


def kind(pid: int, number: int) -> str:
    """Return a descriptor's kind: a file's name, or a socket's family and whether it listens."""
    target = os.readlink(f"/proc/{pid}/fd/{number}")
    if not target.startswith("socket:"):
        return target.partition(":[")[0]
    pidfd = os.pidfd_open(pid)
    try:
        copy = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, number, 0)
        if copy < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
    finally:
        os.close(pidfd)
    with socket.socket(fileno=copy) as found:
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return f"{found.family.name}{' listening' if listens else ''}"


def kinds(pid: int) -> list[str]:
    found = []
    for number, _ in descriptors(pid):
        with contextlib.suppress(FileNotFoundError):
            found.append(kind(pid, number))
    return found


@pytest.fixture
def inheritable() -> Iterator[tuple[socket.socket, str]]:
    """A listening socket and an open file of this process that are inheritable."""
    with socket.socket() as listener, open(__file__, "rb") as file:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        for part in (listener, file):
            os.set_inheritable(part.fileno(), True)
        yield listener, __file__


@pytest.mark.usefixtures("inheritable")
@pytest.mark.parametrize("template_memory_mb", [0, 4096])
async def test_qemu_has_no_socket_of_the_hosts_network(microvm_place: Place, template_memory_mb: int) -> None:
    subject = MicrovmSubject(microvm_place, template_memory_mb=template_memory_mb)
    try:
        sandbox = await subject.backend.start(subject.request())
        record = subject.record(sandbox)
        assert record.machine is not None
        assert record.shim is not None
        files = {str(subject.directory(sandbox).scratch), "/dev/null", "/dev/net/tun", "/dev/zero"}
        files |= {str(path) for path in (microvm_place.image.kernel, microvm_place.image.initrd)}
        for found in kinds(record.machine.pid):
            # QEMU closes the socket of its monitor after the start; the others lead to its shim.
            is_memory = found.startswith(("/memfd:hypercore", "anon_inode"))
            assert found in files or found in ("AF_UNIX", "pipe") or is_memory, found
        # The shim listens for the agent; it has neither the file nor the socket of this process.
        shim = kinds(record.shim.pid)
        assert shim.count("AF_INET listening") == 2
        assert __file__ not in shim
        await subject.backend.stop(sandbox.agent_id, grace=0)
    finally:
        await subject.backend.close()


async def test_a_template_holder_has_the_template_and_one_local_listener(
    subject: MicrovmSubject, inheritable: tuple[socket.socket, str]
) -> None:
    await subject.prepare()
    (description,) = (subject.place.state / "microvm/templates").glob("*/template.json")
    holder = ProcessIdentity.from_json(json.loads(description.read_text())["holder"])
    assert holder is not None
    found = {name for name in kinds(holder.pid) if not name.startswith("/memfd:hypercore")}
    assert found <= {"/dev/null", "AF_UNIX", "AF_UNIX listening"}


@pytest.mark.root
@needs_isolation
async def test_servers_and_sessions_inherit_only_their_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = subprocess.Popen
    file, output = os.open(__file__, os.O_RDONLY), os.open(tmp_path / "output", os.O_WRONLY | os.O_CREAT)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def leaking(*arguments: Any, pass_fds: list[int], **options: Any) -> Any:
            return start(*arguments, pass_fds=[*pass_fds, file, listener.fileno()], **options)

        monkeypatch.setattr(subprocess, "Popen", leaking)
        before = set(_servers())
        with launched(tmp_path / "state") as client:
            (server,) = set(_servers()) - before
            server_kinds = kinds(server)
            null = os.open(os.devnull, os.O_RDWR)
            process = await client.start(
                new_session_id(), ["/bin/sleep", "100"], stdin=null, stdout=output, stderr=null
            )
            os.close(null)
            assert process.pid is not None
            command_kinds = kinds(process.pid)
            process.kill()
            await process.wait()
    os.close(file)
    os.close(output)
    assert "AF_UNIX" in server_kinds
    assert not any(name.startswith(("AF_INET", __file__)) for name in server_kinds)
    assert sorted(command_kinds) == ["/dev/null", "/dev/null", str(tmp_path / "output")]


def _servers() -> list[int]:
    """Return the pids of stand-ins for an agent's server below this process."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            if entry.name.isdigit() and b"AGENT_LAUNCHER_FD" in (entry / "cmdline").read_bytes():
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                grandparent = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
                if grandparent == os.getpid() and not (entry / "cmdline").read_bytes().startswith(b"/usr/bin/env"):
                    found.append(int(entry.name))
    return found


def test_received_descriptors_close_at_exec() -> None:
    """Every receiver of descriptors sets close-on-exec, so that later child processes do not inherit them."""
    found = []
    for path in Path(hypercore_agents.__file__).parent.rglob("*.py"):
        for line in path.read_text().splitlines():
            if re.search(r"\b(recv_fds|recvmsg)\(", line):
                found.append(path.name)
                assert "MSG_CMSG_CLOEXEC" in line, f"{path}: {line.strip()}"
    assert len(found) >= 4
