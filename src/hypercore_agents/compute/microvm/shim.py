"""The process above every VM, and the one place of the platform that needs root.

A program of its own, started as `python -I -S -c PROGRAM AGENT_ID` with the standard library only: there is one beside
every VM, so it must be small. It makes the VM's network (`network`) and forks the child that
shuts itself in (`confinement`) and becomes QEMU. Then it gives up what only that needed (`seclusion`): it has a user of
its own, an empty root, and CAP_KILL alone, which a filter of system calls limits to QEMU's pid. From then on it carries
connections (`forwarding`), keeps what the VM prints, and writes down how it ended.

What it keeps true:
- It outlives the manager: its own session, no descriptor of the manager's.
- QEMU does not outlive it (PR_SET_PDEATHSIG), nor does anything of QEMU's: QEMU is the first process of its pid
  namespace, so the kernel kills all others with it. TAP, namespaces and rules go with these processes.
- Until the manager says `keep`, the VM lives only as long as the conversation: a manager that dies in the middle of a
  start leaves nothing behind.
- What the VM sends is bytes to be passed on, never a command: of its control port only whole lines of bounded length
  are read, and only `exited` means something to the shim.

The conversation with the backend is `conversation`.

Signals: SIGTERM asks the VM to shut down, SIGUSR1 kills it.

Rejected: the manager as QEMU's parent (dies with it); one daemon for all VMs (its death would take all of them along);
a root helper that is called for single steps (as much privilege, and a protocol that could be called in a wrong order).
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
from hypercore_agents.compute.microvm.forwarding import MOST_CONNECTIONS, Forwarder, SocketMaker, Way
from hypercore_agents.compute.microvm.shim_protocol import Conversation, Gone

# Importing `typing` would cost every shim half a megabyte; type checkers take this name for true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hypercore_agents.compute.microvm.shim_protocol import Plan

CONVERSATION = 3
"""Descriptor of the conversation, which the backend hands over."""

PROGRAM = "import sys; sys.path.insert(0, sys.argv[2]); from hypercore_agents.compute.microvm.shim import main; main()"
"""What Python runs; its arguments are the agent's id and the folder that holds the package."""

_SHUTDOWN_SECONDS = 600
_LONGEST_LINE = 64 * 1024
_CHUNK = 64 * 1024
_HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ)


class Shim:
    """One VM, from the plan to its end."""

    def __init__(self, conversation: Conversation, plan: Plan, descriptors: dict[str, int], wakeup: int) -> None:
        self._conversation = conversation
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
        """Make the island and the child that becomes QEMU, and give up what only that needed. Raises OSError."""
        host = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("net", "pid")]
        gateway = self._plan["gateway"]
        tap, outward = network.make_island(gateway=bool(gateway))
        self._descriptors["tap"] = tap
        for name in ("control", "console", "log"):
            self._sockets[name], theirs = socket.socketpair()
            self._descriptors[name] = theirs.detach()
        self._fork(host[1])

        uid = self._plan["uid"] + helper_sandbox.UID_OFFSET
        helper_sandbox.shut_in(self._plan["place"], uid, syscalls.CAP_KILL, syscalls.CAP_SYS_ADMIN)

        def stay_outside() -> None:
            syscalls.enter(host[0], syscalls.CLONE_NEWNET)
            syscalls.keep_capabilities()
            helper_sandbox.restrict()

        outside = SocketMaker(stay_outside)
        for descriptor in (*host, *self._descriptors.values()):
            os.close(descriptor)
        syscalls.keep_capabilities(syscalls.CAP_KILL)
        helper_sandbox.restrict(may_kill=self._process)
        if gateway and outward:
            self._forwarder.open(Way(outward, (gateway[0], gateway[1]), outside.make))

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
        # Or this process could start no thread any more.
        syscalls.enter(own_pid_namespace, syscalls.CLONE_NEWPID)
        self._process = process
        os.close(go)
        os.close(failure_end)
        try:
            self._conversation.say(process=process, numbers=self._descriptors)
            self._conversation.hear()
            os.write(go_end, b"g")
            trouble = os.read(failure, 4096)
        finally:
            os.close(failure)
        if trouble:
            raise OSError(trouble.decode(errors="replace"))
        # The pipe's end stays open in this process: the child takes its closing for our death.
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
        syscalls.close_at_exec_all_but({0, 1, 2, *self._descriptors.values()})
        numbers = {name: str(number) for name, number in self._descriptors.items()}
        arguments = [_filled(argument, numbers) for argument in plan["arguments"]]
        os.execve(arguments[0], arguments, {"PATH": os.defpath})  # noqa: S606 (the operator's QEMU)

    def run(self) -> None:
        """Serve until QEMU has ended; write down how."""
        self._conversation.say(started=True)
        for descriptor in (self._conversation.socket.fileno(), self._wakeup):
            self._poll.register(descriptor, select.EPOLLIN)
        for sock in self._sockets.values():
            sock.setblocking(False)
            self._poll.register(sock, select.EPOLLIN)
        self._handlers = {
            self._conversation.socket.fileno(): self._obey,
            self._wakeup: self._signalled,
            self._sockets["control"].fileno(): self._hear_guest,
            self._sockets["console"].fileno(): lambda: self._copy("console"),
            self._sockets["log"].fileno(): lambda: self._copy("log"),
        }
        while not self._ended:
            for descriptor, events in self._poll.poll(self._forwarder.patience()):
                handler = self._handlers.get(descriptor)
                if handler is None:
                    self._forwarder.handle(descriptor, events)
                else:
                    handler()
            self._forwarder.go_on()

    def kill(self) -> None:
        """Kill QEMU, and with it all in its pid namespace, and collect it."""
        if self._process and not self._ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process, signal.SIGKILL)
            self._reap(0)

    def _obey(self) -> None:
        conversation = self._conversation
        try:
            order = conversation.hear()
        except (Gone, OSError):
            # Its number may soon be a connection's.
            del self._handlers[conversation.socket.fileno()]
            conversation.socket.close()
            if not conversation.kept:
                self.kill()
            return
        if "tell" in order:
            self._tell(order["tell"].encode())
        elif "serve" in order and self._listener is not None:
            self._forwarder.open(Way(self._listener, (network.GUEST, network.AGENT_PORT), _socket_here))
        elif "keep" in order:
            conversation.kept = True
            conversation.say(kept=True)

    def _tell(self, line: bytes) -> None:
        # Never more than what a socket's buffer holds, or the VM could stop us by not reading.
        with contextlib.suppress(OSError):
            self._sockets["control"].send(line)

    def _hear_guest(self) -> None:
        data = _received(self._sockets["control"])
        if data == b"":
            with contextlib.suppress(OSError):
                self._poll.unregister(self._sockets["control"])
        *lines, self._line = (self._line + (data or b"")).split(b"\n")
        self._line = self._line[:_LONGEST_LINE]
        for line in lines:
            kind, body = _parsed(line)
            status = body.get("status")
            if kind == "exited" and isinstance(status, int) and -256 < status < 256:
                self._agent_status = status
            if kind:
                self._conversation.say(guest={kind: body})

    def _copy(self, name: str) -> bool:
        data = _received(self._sockets[name])
        if data == b"":
            with contextlib.suppress(OSError):
                self._poll.unregister(self._sockets[name])
        elif data:
            self._logs[name].write(data)
        return bool(data)

    def _signalled(self) -> None:
        numbers = os.read(self._wakeup, 256)
        if signal.SIGUSR1 in numbers:
            self.kill()
        elif signal.SIGTERM in numbers:
            self._tell(b'{"shutdown": {"grace": %d}}\n' % _SHUTDOWN_SECONDS)
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
        self._hear_guest()
        self._exit.write(
            status=os.waitstatus_to_exitcode(status),
            agent=self._agent_status,
            memory_kills=self._memory_kills.count(),
        )
        self._conversation.say(error="the virtual machine ended")


def _socket_here(family: int) -> socket.socket:
    return socket.socket(family, socket.SOCK_STREAM)


def _received(sock: socket.socket) -> bytes | None:
    """Return what there is to read: b"" at the end, None when there is nothing now."""
    try:
        return sock.recv(_CHUNK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _parsed(line: bytes) -> tuple[str, dict[str, Any]]:
    """Return kind and body of a guest's line (`api.guest`, which would cost every shim some megabytes), "" for none."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return "", {}
    if isinstance(said, dict) and len(said) == 1:
        ((kind, body),) = said.items()
        if isinstance(body, dict):
            return kind, body
    return "", {}


def _filled(argument: str, numbers: dict[str, str]) -> str:
    for name, number in numbers.items():
        argument = argument.replace("{" + name + "}", number)
    return argument


_OPEN_FILES = 4 * MOST_CONNECTIONS + 256


def main() -> None:
    """Be the shim of one VM."""
    os.chdir("/")
    close_above(CONVERSATION)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a guest opens connections, two descriptors each
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, _OPEN_FILES), hard))
    os.set_inheritable(CONVERSATION, False)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    wakeup, wakeup_end = os.pipe()
    os.set_blocking(wakeup_end, False)
    signal.set_wakeup_fd(wakeup_end)
    for number in _HANDLED:
        signal.signal(number, lambda *_: None)
    conversation = Conversation(socket.socket(fileno=CONVERSATION))
    shim = None
    try:
        plan, descriptors = conversation.plan()
        shim = Shim(conversation, plan, descriptors, wakeup)
        shim.start()
        gc.collect()  # what the imports left: most of a megabyte
        gc.freeze()
        shim.run()
    except BaseException as error:
        if shim is not None:
            shim.kill()
        if not isinstance(error, Gone):
            conversation.say(error=f"{type(error).__name__}: {error}")
        sys.exit(1)
