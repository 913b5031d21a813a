"""The isolation of a VM from the network and the host; controls show that each probe works.

The "host" is a network namespace that the test creates in a separate thread, with a loopback device and two addresses,
so a failure never probes anything outside the test.
"""

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from hypercore_agents.compute.base import Sandbox, SandboxState
from hypercore_agents.compute.host.shims import memory_kills
from hypercore_agents.compute.microvm import network, syscalls
from hypercore_agents.compute.testing.conformance import SECRET, eventually
from support.microvm_backend import MicrovmSubject, Place, ask

T = TypeVar("T")
HOST, METADATA, HOST_6 = "10.99.7.1", "169.254.169.254", "fd00:99:7::1"
NETWORK_6 = "fe80::5054:ff:fe48:4301%eth0"
"""The link-local address that the host's end of a VM's network would have, by its hardware address."""
MANAGER, OTHER, GATEWAY = 8080, 9999, 8090


def in_own_network(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in a thread whose network namespace is new and has HOST, METADATA and HOST_6 as addresses."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            syscalls.unshare(syscalls.CLONE_NEWNET)
            commands = "link set lo up\n" + "".join(f"addr add {ip} dev lo\n" for ip in (HOST, METADATA, HOST_6))
            subprocess.run(["ip", "-batch", "-"], input=commands.encode(), check=True)
            result.append(asyncio.run(work()))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


@contextlib.asynccontextmanager
async def greeters(*addresses: tuple[str, int]) -> AsyncIterator[None]:
    """Serve at each address; a client gets HELLO and the port."""
    async with contextlib.AsyncExitStack() as stack:
        for host, port in addresses:

            async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int = port) -> None:
                writer.write(f"HELLO {port}".encode())
                await writer.drain()
                writer.close()

            await stack.enter_async_context(await asyncio.start_server(greet, host, port))
        yield


async def greeting(host: str, port: int, seconds: float = 2.0) -> str:
    """Return the greeting at an address, empty if nothing listens there."""
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(host, port)
            answer = await reader.read(100)
            writer.close()
            return answer.decode()
    except (OSError, TimeoutError):
        return ""


def probes(*addresses: tuple[str, int]) -> str:
    """Return a command that connects to all addresses at once from the guest and prints the answers."""
    tries = [f"(echo {host} {port} $(nc -w 2 {host} {port} </dev/null 2>&1)) &" for host, port in addresses]
    return " ".join([*tries, "wait"])


def parsed(output: str) -> dict[tuple[str, int], str]:
    found = {}
    for line in output.splitlines():
        host, port, words = [*line.split(" ", 2), ""][:3]
        found[(host, int(port))] = words
    return found


def qemu(subject: MicrovmSubject, sandbox: Sandbox) -> int:
    machine = subject.record(sandbox).machine
    assert machine is not None
    return machine.pid


def test_a_vm_reaches_only_the_gateways_port(microvm_place: Place) -> None:
    async def scenario() -> None:
        subject = MicrovmSubject(microvm_place)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as dns:
            dns.bind((HOST, 53))
            dns.setblocking(False)
            heard: list[bytes] = []
            asyncio.get_running_loop().add_reader(dns, lambda: heard.append(dns.recv(1000)))
            everywhere = [("0.0.0.0", MANAGER), ("0.0.0.0", OTHER), ("127.0.0.1", GATEWAY), (METADATA, 80)]
            async with greeters(*everywhere, (HOST_6, MANAGER), (HOST_6, GATEWAY)):
                request = subject.request()
                object.__setattr__(request, "gateway_url", f"http://127.0.0.1:{GATEWAY}")
                one, two = await asyncio.gather(
                    subject.backend.start(request), subject.backend.start(subject.request())
                )
                try:
                    second = int(two.address.rpartition(":")[2])
                    # The controls: all addresses answer on the host.
                    everything = [(HOST, MANAGER), (HOST, OTHER), (METADATA, 80), ("127.0.0.1", GATEWAY)]
                    everything += [(HOST_6, MANAGER), (HOST_6, GATEWAY)]
                    assert [await greeting(*address) for address in everything] == [
                        "HELLO 8080", "HELLO 9999", "HELLO 80", "HELLO 8090", "HELLO 8080", "HELLO 8090",
                    ]  # fmt: skip
                    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                        control.sendto(b"control", (HOST, 53))
                    await eventually(lambda: _true(heard))
                    assert heard == [b"control"]
                    assert "two" in await ask(two, "echo two")

                    gateway = (network.HOST, network.GATEWAY_PORT)
                    closed = [
                        *((network.HOST, port) for port in (MANAGER, OTHER, second, 22, 53, 80)),
                        *((HOST, port) for port in (MANAGER, OTHER, GATEWAY, second)),
                        (METADATA, 80),
                        ("10.0.77.3", network.GATEWAY_PORT),
                    ]
                    answers = parsed(await ask(one, probes(gateway, *closed)))
                    assert answers.pop(gateway) == "HELLO 8090"
                    assert len(answers) == len(closed)
                    assert not any("HELLO" in words for words in answers.values()), answers
                    # Nor over IPv6, which the guest's kernel can configure as it likes.
                    six = "ip -6 addr add fd00:99:7::2/64 dev eth0 nodad; ip -6 route add default dev eth0"
                    assert "six" in await ask(one, f"{six}; echo 'echo six' | nc -w 5 ::1 8080")
                    closed = [(ip, port) for ip in (HOST_6, NETWORK_6) for port in (MANAGER, GATEWAY, second)]
                    answers = parsed(await ask(one, probes(*closed)))
                    assert len(answers) == len(closed)
                    assert not any("HELLO" in words for words in answers.values()), answers
                    assert "100% packet loss" in await ask(one, f"ping6 -c 1 -W 1 {NETWORK_6}")
                    assert "0% packet loss" in await ask(one, "ping6 -c 1 -W 1 ::1")
                    # No name service and no ICMP echo.
                    for host in (HOST, network.HOST):
                        lookup = await ask(one, f"nslookup -timeout=1 -retry=1 example.com {host}")
                        assert "no servers could be reached" in lookup  # it sent a query
                        assert "write to" not in lookup, lookup
                    assert heard == [b"control"]
                    assert "100% packet loss" in await ask(one, f"ping -c 1 -W 1 {network.HOST}")
                    assert "0% packet loss" in await ask(one, f"ping -c 1 -W 1 {network.GUEST}")
                finally:
                    await asyncio.gather(*(subject.backend.stop(box.agent_id, grace=0) for box in (one, two)))
                    await subject.backend.close()

    in_own_network(scenario)


def test_the_host_reaches_only_the_agents_port(microvm_place: Place) -> None:
    async def scenario() -> None:
        subject = MicrovmSubject(microvm_place)
        sandbox = await subject.backend.start(subject.request())
        try:
            await ask(sandbox, "nc -ll -p 9090 -e /agent >/dev/null 2>&1 & usleep 300000")
            assert "control" in await ask(sandbox, "echo 'echo control' | nc -w 5 127.0.0.1 9090")

            def in_the_vms_network() -> tuple[bool, bool, list[str]]:
                namespace = os.open(f"/proc/{qemu(subject, sandbox)}/ns/net", os.O_RDONLY)
                syscalls.enter(namespace, syscalls.CLONE_NEWNET)
                os.close(namespace)
                forwarding = [
                    Path(f"/proc/sys/net/ipv4/{name}").read_text().strip()
                    for name in ("ip_forward", "conf/all/route_localnet", "conf/tap0/route_localnet")
                ]
                return _connects(network.GUEST, 8080), _connects(network.GUEST, 9090), forwarding

            assert await _in_a_thread(in_the_vms_network) == (True, False, ["0", "0", "0"])
        finally:
            await subject.backend.stop(sandbox.agent_id, grace=0)
            await subject.backend.close()

    in_own_network(scenario)


async def test_qemu_has_no_privileges_and_an_almost_empty_root(subject: MicrovmSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    record, pid = subject.record(sandbox), qemu(subject, sandbox)
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert set(status["Uid"].split() + status["Gid"].split()) == {str(record.uid)}
    assert status["Groups"].strip() == ""
    for held in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[held], 16) == 0, held
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    for kind in ("net", "mnt", "pid", "ipc", "uts"):
        assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind
    seen = {path.name for path in Path(f"/proc/{pid}/root").iterdir()}
    assert seen <= {"bin", "dev", "etc", "lib", "lib64", "proc", "sbin", "usr"}
    assert {path.name for path in Path(f"/proc/{pid}/root/dev").iterdir()} == {"null", "urandom"}
    shim = record.shim
    assert shim is not None
    effective = re.search(r"CapEff:\t(\w+)", Path(f"/proc/{shim.pid}/status").read_text())
    assert effective is not None
    assert int(effective[1], 16) == 1 << syscalls.CAP_KILL


async def test_control_groups_limit_qemu(subject: MicrovmSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    cores, memory_kb = (await ask(sandbox, "nproc; sed -n 's/MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo")).split()
    assert cores == "1"
    assert 400 << 10 < int(memory_kb) <= 512 << 10
    if subject.backend.capabilities.enforced_limits != {"cores", "memory", "pids"}:
        pytest.skip("needs writable control groups")
    values = {}
    for group in subject.record(sandbox).cgroups:
        assert str(qemu(subject, sandbox)) in Path(group, "cgroup.procs").read_text().split()
        for name in ("memory.limit_in_bytes", "memory.max", "pids.max", "cpu.cfs_quota_us", "cpu.max"):
            if Path(group, name).exists():
                values[name] = Path(group, name).read_text().split()[0]
    memory = values.get("memory.limit_in_bytes") or values["memory.max"]
    assert int(memory) == (512 + 256) << 20
    assert (values.get("cpu.cfs_quota_us") or values["cpu.max"]) == "100000"
    assert int(values["pids.max"]) < 200


async def test_a_hostile_guest_affects_only_itself(subject: MicrovmSubject) -> None:
    hostile, other = await asyncio.gather(*(subject.backend.start(subject.request()) for _ in range(2)))
    full = await ask(hostile, "dd if=/dev/zero of=/scratch/all bs=1M count=200 2>&1; df -m /scratch | tail -n 1")
    assert "No space left" in full
    disk = subject.directory(hostile).scratch.stat()
    assert disk.st_size == 64 << 20
    assert disk.st_blocks * 512 <= 64 << 20
    # The guest's kernel kills processes that use up its memory; the host's kernel does not kill the guest.
    assert "over" in await ask(hostile, "tail /dev/zero; tail /dev/zero; echo over", seconds=120)
    running = await subject.backend.inspect(hostile.agent_id)
    assert running is not None
    assert running.state == SandboxState.RUNNING
    assert memory_kills([*subject.record(hostile).cgroups]) == 0
    with contextlib.suppress(TimeoutError, ConnectionError):
        await ask(hostile, "b() { b | b & }; b & sleep 2", seconds=5)
    assert "alive" in await ask(other, "echo alive >/file; cat /file")
    assert memory_kills([*subject.record(other).cgroups]) == 0
    await subject.backend.stop(hostile.agent_id, grace=0)
    assert [sandbox.agent_id for sandbox in await subject.backend.list()] == [other.agent_id]


async def test_a_clone_cannot_change_its_template(subject: MicrovmSubject) -> None:
    one = await subject.backend.start(subject.request())
    (template,) = subject.backend._templates._leased.values()  # type: ignore[attr-defined]
    before = {name: _digest(block) for name, block in template.memory.items()}
    # The clone writes as much memory as it can, and prints the secret from its identity.
    written = await ask(one, "echo MARKER >/marker; for i in $(seq 75); do cat /bin/busybox; done >/big; cat /identity")
    assert SECRET in written
    assert {name: _digest(block) for name, block in template.memory.items()} == before
    assert any(_holds(block, b"waiting-for-identity") for block in template.memory.values())
    disk = os.open(template.scratch, os.O_RDONLY)
    for part in (*template.memory.values(), template.state, disk):
        assert not _holds(part, SECRET.encode())
    os.close(disk)
    # Writing through a descriptor fails, too; the control shows that the seal is the reason.
    unsealed = os.memfd_create("control")
    os.write(unsealed, b"x")
    os.close(unsealed)
    for block in template.memory.values():
        opened_again = os.open(f"/proc/self/fd/{block}", os.O_RDWR)
        with pytest.raises(PermissionError):
            os.pwrite(opened_again, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(opened_again, 0)
        os.close(opened_again)
    two = await subject.backend.start(subject.request())
    assert "No such file" in await ask(two, "ls /marker /big")


async def test_clones_have_their_own_identity(subject: MicrovmSubject) -> None:
    one, two = await asyncio.gather(*(subject.backend.start(subject.request()) for _ in range(2)))
    names = [(await ask(sandbox, "hostname")).strip() for sandbox in (one, two)]
    assert names == [one.agent_id, two.agent_id]
    clocks = [int(await ask(sandbox, "date +%s")) for sandbox in (one, two)]
    assert abs(clocks[0] - clocks[1]) < 60
    assert abs(clocks[0] - one.started_at) < 60


def _digest(descriptor: int) -> str:
    import hashlib

    with open(f"/proc/self/fd/{descriptor}", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _holds(descriptor: int, wanted: bytes) -> bool:
    tail = b""
    with open(f"/proc/self/fd/{descriptor}", "rb") as file:
        while chunk := file.read(1 << 22):
            if wanted in tail + chunk:
                return True
            tail = chunk[-len(wanted) :]
    return False


def _connects(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        try:
            probe.connect((host, port))
        except OSError:
            return False
        return True


async def _in_a_thread(work: Callable[[], T]) -> T:
    """Run in a new thread, because the namespace that the work enters must not be used by other work."""
    result: list[T] = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    while thread.is_alive():
        await asyncio.sleep(0.01)
    return result[0]


async def _true(value: object) -> bool:
    return bool(value)
