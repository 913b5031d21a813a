"""The process above every VM: it starts QEMU, forwards the VM's connections, and stores its output and exit status.

The shim is a separate program (`python -I -S -c PROGRAM AGENT_ID PACKAGE_FOLDER`) that uses the standard library
only. One runs beside every VM, so it must be small. It starts as root, creates the VM's network (`network`), and forks
the child that confines itself (`confinement`) and becomes QEMU. Then it drops the privileges that only these steps need
(`helper_sandbox`): it keeps its own user, an empty root, and CAP_KILL, which a system call filter limits to QEMU's pid.
From then on it forwards connections (`forwarding`), stores the VM's output, and records how the VM ended.

Invariants:
- It outlives the manager: it has its own session and no descriptor of the manager.
- QEMU does not outlive it (PR_SET_PDEATHSIG). QEMU is the first process of its pid namespace, so the kernel kills all
  other processes there with it. TAP device, namespaces and rules disappear with these processes.
- Until the manager sends `keep`, the VM ends when the connection to the manager closes: a manager that dies during a
  start leaves nothing behind.
- Data from the VM is passed on and never executed. From its control port the shim reads only whole lines of limited
  length, and interprets only `exited`.

`shim_protocol` describes the messages between shim and backend.

Signals: SIGTERM requests a shutdown of the VM, SIGUSR1 kills it.

Rejected: the manager as QEMU's parent (dies with it); one daemon for all VMs (its death would end all of them); a root
helper that is called for single steps (the same privileges, and calls in a wrong order would be possible).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import signal
import socket
import sys

from hypercore_agents.compute.host.shims import BoundedLog, ExitFile, MemoryKills, close_above
from hypercore_agents.compute.microvm import confinement, helper_sandbox, network, syscalls
from hypercore_agents.compute.microvm.forwarding import MAX_CONNECTIONS, Forwarder, Route, SocketMaker
from hypercore_agents.compute.microvm.shim_protocol import BackendConnection, BackendGone

# Importing `typing` would cost every shim half a megabyte; type checkers treat this name as true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hypercore_agents.compute.microvm.shim_protocol import Plan

CONTROL = 3
"""Descriptor of the connection to the backend."""

PROGRAM = "import sys; sys.path.insert(0, sys.argv[2]); from hypercore_agents.compute.microvm.shim import main; main()"
"""The Python program; its arguments are the agent's id and the folder that holds the package."""

_SHUTDOWN_SECONDS = 600
_MAX_LINE_BYTES = 64 * 1024
_CHUNK = 64 * 1024
_HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ)


class Shim:
    """The shim of one VM, from the plan to the VM's end."""

    def __init__(self, backend: BackendConnection, plan: Plan, descriptors: dict[str, int], wakeup: int) -> None:
        self._backend = backend
        self._plan = plan
        self._wakeup = wakeup
        self._descriptors = descriptors
        self._listener = socket.socket(fileno=descriptors.pop("listener")) if "listener" in descriptors else None
        self._logs = {name: BoundedLog(plan[name], plan["log_bytes"]) for name in ("log", "console")}
        self._exit = ExitFile(plan["exit"])
        self._memory_kills = MemoryKills(plan["cgroups"])
        self._poll = select.epoll()
        self._forwarder = Forwarder(self._poll)
        self._sockets: dict[str, socket.socket] = {}
        self._line = b""
        self._process = 0
        self._agent_status: int | None = None
        self._ended = False
        self._handlers: dict[int, Callable[[], object]] = {}

    def start(self) -> None:
        """Create the VM's network and the child that becomes QEMU, and drop privileges. Raises OSError."""
        host = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("net", "pid")]
        gateway = self._plan["gateway"]
        tap, gateway_listener = network.create_network(gateway=bool(gateway))
        self._descriptors["tap"] = tap
        for name in ("control", "console", "log"):
            self._sockets[name], theirs = socket.socketpair()
            self._descriptors[name] = theirs.detach()
        self._fork(host[1])

        uid = self._plan["uid"] + helper_sandbox.UID_OFFSET
        helper_sandbox.enter(self._plan["place"], uid, syscalls.CAP_KILL, syscalls.CAP_SYS_ADMIN)

        def enter_host_network() -> None:
            syscalls.enter(host[0], syscalls.CLONE_NEWNET)
            syscalls.keep_capabilities()
            helper_sandbox.filter_system_calls()

        host_sockets = SocketMaker(enter_host_network)
        for descriptor in (*host, *self._descriptors.values()):
            os.close(descriptor)
        syscalls.keep_capabilities(syscalls.CAP_KILL)
        helper_sandbox.filter_system_calls(may_kill=self._process)
        if gateway and gateway_listener:
            self._forwarder.open(Route(gateway_listener, (gateway[0], gateway[1]), host_sockets.make))

    def _fork(self, own_pid_namespace: int) -> None:
        go, go_end = os.pipe()
        failure, failure_end = os.pipe()
        syscalls.unshare(syscalls.CLONE_NEWPID)
        process = os.fork()
        if process == 0:
            try:
                os.close(go_end)
                self._become_qemu(go)
            except BaseException as error:
                os.write(failure_end, f"{error}".encode(errors="replace")[:4096])
            finally:
                os._exit(127)
        # Otherwise this process could no longer start threads.
        syscalls.enter(own_pid_namespace, syscalls.CLONE_NEWPID)
        self._process = process
        os.close(go)
        os.close(failure_end)
        try:
            self._backend.send(process=process, numbers=self._descriptors)
            self._backend.receive()
            os.write(go_end, b"g")
            failed = os.read(failure, 4096)
        finally:
            os.close(failure)
        if failed:
            raise OSError(failed.decode(errors="replace"))
        # The pipe's end stays open in this process: to the child, its closing means that the shim has died.
        os.set_inheritable(go_end, False)

    def _become_qemu(self, go: int) -> None:
        if os.read(go, 1) == b"":
            os._exit(0)
        signal.set_wakeup_fd(-1)
        for number in (*_HANDLED, *_IGNORED):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        plan = self._plan
        confinement.confine(place=plan["place"], uid=plan["uid"], groups=plan["cgroups"], kvm=plan["kvm"], go=go)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(self._descriptors["console"] if descriptor else null, descriptor)
        syscalls.close_on_exec_except({0, 1, 2, *self._descriptors.values()})
        numbers = {name: str(number) for name, number in self._descriptors.items()}
        arguments = [_with_numbers(argument, numbers) for argument in plan["arguments"]]
        os.execve(arguments[0], arguments, {"PATH": os.defpath})  # noqa: S606 (the operator's QEMU)

    def run(self) -> None:
        """Run until QEMU has ended, and record how it ended."""
        self._backend.send(started=True)
        for descriptor in (self._backend.socket.fileno(), self._wakeup):
            self._poll.register(descriptor, select.EPOLLIN)
        for sock in self._sockets.values():
            sock.setblocking(False)
            self._poll.register(sock, select.EPOLLIN)
        self._handlers = {
            self._backend.socket.fileno(): self._handle_backend,
            self._wakeup: self._handle_signals,
            self._sockets["control"].fileno(): self._handle_guest,
            self._sockets["console"].fileno(): lambda: self._copy("console"),
            self._sockets["log"].fileno(): lambda: self._copy("log"),
        }
        while not self._ended:
            for descriptor, events in self._poll.poll(self._forwarder.seconds_until_resume()):
                handler = self._handlers.get(descriptor)
                if handler is None:
                    self._forwarder.handle(descriptor, events)
                else:
                    handler()
            self._forwarder.resume()

    def kill(self) -> None:
        """Kill QEMU, and with it all processes of its pid namespace, and reap it."""
        if self._process and not self._ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process, signal.SIGKILL)
            self._reap(0)

    def _handle_backend(self) -> None:
        backend = self._backend
        try:
            order = backend.receive()
        except (BackendGone, OSError):
            # A forwarded connection may get the same number.
            del self._handlers[backend.socket.fileno()]
            backend.socket.close()
            if not backend.detached:
                self.kill()
            return
        if "tell" in order:
            self._send_to_guest(order["tell"].encode())
        elif "serve" in order and self._listener is not None:
            self._forwarder.open(Route(self._listener, (network.GUEST, network.AGENT_PORT), _local_socket))
        elif "keep" in order:
            backend.detached = True
            backend.send(kept=True)

    def _send_to_guest(self, line: bytes) -> None:
        # Drops data that the socket's buffer cannot hold: a VM that does not read must not stop the shim.
        with contextlib.suppress(OSError):
            self._sockets["control"].send(line)

    def _handle_guest(self) -> None:
        data = _received(self._sockets["control"])
        if data == b"":
            with contextlib.suppress(OSError):
                self._poll.unregister(self._sockets["control"])
        *lines, self._line = (self._line + (data or b"")).split(b"\n")
        self._line = self._line[:_MAX_LINE_BYTES]
        for line in lines:
            kind, body = _parsed(line)
            status = body.get("status")
            if kind == "exited" and isinstance(status, int) and -256 < status < 256:
                self._agent_status = status
            if kind:
                self._backend.send(guest={kind: body})

    def _copy(self, name: str) -> bool:
        data = _received(self._sockets[name])
        if data == b"":
            with contextlib.suppress(OSError):
                self._poll.unregister(self._sockets[name])
        elif data:
            self._logs[name].write(data)
        return bool(data)

    def _handle_signals(self) -> None:
        numbers = os.read(self._wakeup, 256)
        if signal.SIGUSR1 in numbers:
            self.kill()
        elif signal.SIGTERM in numbers:
            self._send_to_guest(b'{"shutdown": {"grace": %d}}\n' % _SHUTDOWN_SECONDS)
        self._reap(os.WNOHANG)

    def _reap(self, options: int) -> None:
        if self._ended:
            return
        pid, status = os.waitpid(self._process, options)
        if pid != self._process:
            return
        self._ended = True
        for sock in self._sockets.values():
            sock.setblocking(False)
        while self._copy("console") or self._copy("log"):
            pass
        self._handle_guest()
        self._exit.write(
            status=os.waitstatus_to_exitcode(status),
            agent=self._agent_status,
            memory_kills=self._memory_kills.count(),
        )
        self._backend.send(error="the virtual machine ended")


def _local_socket(family: int) -> socket.socket:
    return socket.socket(family, socket.SOCK_STREAM)


def _received(sock: socket.socket) -> bytes | None:
    """Return the available data: b"" at the end, None if there is none now."""
    try:
        return sock.recv(_CHUNK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _parsed(line: bytes) -> tuple[str, dict[str, Any]]:
    """Return kind and body of a guest's line, "" if it is invalid (`api.guest`, which is too large to import here)."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return "", {}
    if isinstance(message, dict) and len(message) == 1:
        ((kind, body),) = message.items()
        if isinstance(body, dict):
            return kind, body
    return "", {}


def _with_numbers(argument: str, numbers: dict[str, str]) -> str:
    for name, number in numbers.items():
        argument = argument.replace("{" + name + "}", number)
    return argument


_OPEN_FILES = 4 * MAX_CONNECTIONS + 256


def main() -> None:
    """Run the shim of one VM."""
    os.chdir("/")
    close_above(CONTROL)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # each connection of the guest takes two descriptors
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, _OPEN_FILES), hard))
    os.set_inheritable(CONTROL, False)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    wakeup, wakeup_end = os.pipe()
    os.set_blocking(wakeup_end, False)
    signal.set_wakeup_fd(wakeup_end)
    for number in _HANDLED:
        signal.signal(number, lambda *_: None)
    backend = BackendConnection(socket.socket(fileno=CONTROL))
    shim = None
    try:
        plan, descriptors = backend.receive_plan()
        shim = Shim(backend, plan, descriptors, wakeup)
        shim.start()
        gc.collect()  # frees most of a megabyte that the imports leave
        gc.freeze()
        shim.run()
    except BaseException as error:
        if shim is not None:
            shim.kill()
        if not isinstance(error, BackendGone):
            backend.send(error=f"{type(error).__name__}: {error}")
        sys.exit(1)
