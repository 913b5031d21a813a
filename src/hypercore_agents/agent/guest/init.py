"""pid 1 of a microVM: sets the machine up, starts launcher and server, gives them their identity, reaps, powers off.

One loop over a few descriptors, in one thread: the control port, the socket to the server, the server's output and
SIGCHLD. The machine lives as long as its server: a server that ends is a failed agent, so the machine powers off.
Anything unexpected here ends pid 1, which panics the kernel and ends the VM: fail closed.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from hypercore_agents.agent.guest import machine
from hypercore_agents.agent.guest.bounded_lines import LineReader, Outlet
from hypercore_agents.agent.guest.handover import CHANNEL, SERVING, UP
from hypercore_agents.agent.guest.identity import take, who_we_are
from hypercore_agents.api.guest import (
    AGENT_PORT,
    CONTROL_PORT,
    LOG_PORT,
    PROTOCOL,
    BootParameters,
    GuestProtocolError,
    Identity,
    message,
    parse_message,
)

_PYTHON = (sys.executable, "-I", "-m")
_SESSION_UIDS = "10000-1009999"
"""A million users, each used once (`agent.launcher`)."""
_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    "LANG": "C.UTF-8",
    "HOME": str(machine.STATE),
    "GUEST_CHANNEL_FD": str(CHANNEL),
    "UV_USE_IO_URING": "0",  # libuv is content without, and every clone is spared that part of the kernel
}
_ABSENT_SECONDS = 0.02
"""Pause between looks at a port that has nobody at its other end: such a port is always readable, with nothing."""
_MOST_PENDING_LOG = 262144
_MOST_PENDING_CONTROL = 65536
_KILL_AFTER_SECONDS = 10.0


def main() -> NoReturn:
    """Be pid 1."""
    try:
        parameters = BootParameters.parse(Path("/proc/cmdline").read_text())
        _note("kernel")
        machine.set_up_mounts()
        _note("mounts")
        machine.set_up_network(parameters)
        _note("network")
        machine.harden()
        Guest(parameters).run()
    except BaseException:
        traceback.print_exc()
    machine.power_off()
    raise SystemExit(1)  # the kernel panics, which ends the VM too


class Guest:
    """The running machine."""

    def __init__(self, parameters: BootParameters) -> None:
        self._parameters = parameters
        self._selector = selectors.DefaultSelector()
        self._lines = LineReader()
        control = machine.port_device(CONTROL_PORT)
        if control is None:
            raise machine.MachineError(f"the machine has no port {CONTROL_PORT}")
        # one description per direction: reading and writing end are watched apart
        self._control = os.open(control, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._answers = Outlet(self._control, _MOST_PENDING_CONTROL)
        log = machine.port_device(LOG_PORT) or Path("/dev/console")
        self._log = Outlet(os.open(log, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), _MOST_PENDING_LOG)
        self._identity: Identity | None = None
        self._kill_at: float | None = None
        self._ended: int | None = None
        self._wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._server, self._channel, self._output = _start_server()

    def run(self) -> None:
        """Supervise until the server has ended."""
        watch = self._selector.register
        watch(self._wake, selectors.EVENT_READ, self._reap)
        watch(self._channel, selectors.EVENT_READ, self._hear_server)
        watch(self._output, selectors.EVENT_READ, self._pass_output)
        watch(self._control, selectors.EVENT_READ, self._hear_host)
        while self._ended is None:
            waiting = self._log.pending or self._answers.pending
            timeout = 0.05 if waiting else None
            if self._kill_at is not None:
                timeout = min(timeout or 1.0, max(0.0, self._kill_at - time.monotonic()))
            for key, _ in self._selector.select(timeout):
                key.data()
            self._log.flush()
            self._answers.flush()
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                os.kill(self._server, signal.SIGKILL)
        with contextlib.suppress(KeyError, ValueError):  # its last words, if they were not heard yet
            while self._pass_output():
                pass
        self._say("exited", status=self._ended)

    def _hear_host(self) -> None:
        try:
            data = os.read(self._control, 65536)
        except BlockingIOError:
            return
        if not data:  # nobody is there (yet)
            time.sleep(_ABSENT_SECONDS)
            return
        for line in self._lines.feed(data):
            try:
                kind, body = parse_message(line)
                if kind == "identity":
                    self._become(Identity.parse(body))
                elif kind == "shutdown":
                    self._shut_down(body)
                else:
                    raise GuestProtocolError("a guest takes identity and shutdown")
            except GuestProtocolError as error:
                self._say("refused", message=str(error))

    def _become(self, identity: Identity) -> None:
        if self._identity is not None:
            raise GuestProtocolError("this guest has its identity already")
        take(identity)
        _say_on_console(f"{who_we_are()}, identified")
        self._identity = identity
        handover = {
            "entropy": identity.entropy.hex(),
            "enrolment_secret": identity.enrolment_secret,
            "environment": {
                "LOG_LEVEL": self._parameters.log_level,
                **identity.environment,
                "AGENT_ID": identity.agent_id,
                "GATEWAY_URL": self._parameters.gateway_url,
                "AGENT_HOST": "0.0.0.0",  # noqa: S104 - the VM's one address; the host's rules say who gets here
                "AGENT_PORT": str(AGENT_PORT),
            },
        }
        self._channel.setblocking(True)
        self._channel.sendall(json.dumps(handover).encode() + b"\n")
        self._channel.setblocking(False)
        self._say("identified", agent_id=identity.agent_id)

    def _shut_down(self, body: dict[str, object]) -> None:
        grace = body.get("grace", _KILL_AFTER_SECONDS)
        if isinstance(grace, bool) or not isinstance(grace, int | float) or not 0 <= grace <= 3600:
            raise GuestProtocolError("shutdown.grace must be seconds, 0 to 3600")
        self._kill_at = time.monotonic() + grace
        os.kill(self._server, signal.SIGTERM)

    def _hear_server(self) -> None:
        try:
            said = self._channel.recv(4096)
        except BlockingIOError:
            return
        except ConnectionResetError:
            said = b""
        if not said:
            self._selector.unregister(self._channel)
        for word in said.splitlines(keepends=True):
            if word == UP:
                _note("server")
                machine.spare_the_server()
                self._say("waiting-for-identity", protocol=PROTOCOL)
            elif word == SERVING and self._identity is not None:
                self._say("ready", agent_id=self._identity.agent_id)

    def _pass_output(self) -> bool:
        try:
            data = os.read(self._output, 65536)
        except BlockingIOError:
            return False
        if data:
            self._log.write(data)
        else:
            self._selector.unregister(self._output)
        return bool(data)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._server:
                    self._ended = os.waitstatus_to_exitcode(status)

    def _say(self, kind: str, **body: object) -> None:
        self._answers.write(message(kind, **body))


def _note(done: str) -> None:
    """Say on the serial console how long the machine has been up, for whoever looks at a slow boot."""
    _say_on_console(f"{done} after {time.clock_gettime(time.CLOCK_BOOTTIME):.2f} s")


def _say_on_console(words: str) -> None:
    print(f"guest: {words}", file=sys.stderr, flush=True)  # noqa: T201


def _command() -> tuple[str, ...]:
    """Return what starts the launcher, as root, and through it the server, as nobody in particular."""
    limits = machine.session_limits()
    return (
        *_PYTHON,
        "hypercore_agents.agent.launcher",
        *("--uid", str(machine.AGENT_UID), "--session-uids", _SESSION_UIDS, "--state", str(machine.STATE)),
        *("--session-memory-mb", str(limits.memory_mb), "--session-disk-mb", str(limits.disk_mb)),
        *("--session-scratch-mb", str(limits.scratch_mb), "--storage", "quota"),
        *("--", *_PYTHON, "hypercore_agents.agent.guest.standby"),
    )


def _start_server() -> tuple[int, socket.socket, int]:
    """Start launcher and server; return the launcher's pid, the socket to the server, the read end of their output."""
    ours, theirs = socket.socketpair()
    output, writer = os.pipe2(os.O_CLOEXEC)
    nothing = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    command = _command()
    pid = os.posix_spawn(
        command[0],
        command,
        _ENVIRONMENT,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, nothing, 0),
            (os.POSIX_SPAWN_DUP2, writer, 1),
            (os.POSIX_SPAWN_DUP2, writer, 2),
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), CHANNEL),
        ],
        setsigdef=[signal.SIGCHLD, signal.SIGPIPE],
    )
    theirs.close()
    os.close(writer)
    os.close(nothing)
    ours.setblocking(False)
    os.set_blocking(output, False)
    return pid, ours, output
