"""pid 1 of a microVM: sets up the machine, starts launcher and server, hands over the identity, reaps, powers off.

One thread runs one loop over a few descriptors: the control port, the socket to the server, the server's output and
SIGCHLD. The machine runs as long as its server: a server that ends is a failed agent, so the machine powers off. An
unexpected error ends pid 1, which panics the kernel and ends the VM: it fails closed.
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
from hypercore_agents.agent.guest.bounded_lines import BoundedWriter, LineReader
from hypercore_agents.agent.guest.handover import CHANNEL, SERVING, UP
from hypercore_agents.agent.guest.identity import apply, describe_machine
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
"""A million uids, each used once (`agent.launcher`)."""
_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    "LANG": "C.UTF-8",
    "HOME": str(machine.STATE),
    "GUEST_CHANNEL_FD": str(CHANNEL),
    "UV_USE_IO_URING": "0",  # libuv works without it, and clones do not load that part of the kernel
}
_DISCONNECTED_SECONDS = 0.02
"""Pause between reads of a port that the host has not opened: such a port is always readable, and reads return b""."""
_MOST_PENDING_LOG = 262144
_MOST_PENDING_CONTROL = 65536
_KILL_AFTER_SECONDS = 10.0


def main() -> NoReturn:
    """Run pid 1."""
    try:
        parameters = BootParameters.parse(Path("/proc/cmdline").read_text())
        _log_boot_step("kernel")
        machine.set_up_mounts()
        _log_boot_step("mounts")
        machine.set_up_network(parameters)
        _log_boot_step("network")
        machine.harden()
        Guest(parameters).run()
    except BaseException:
        traceback.print_exc()
    machine.power_off()
    raise SystemExit(1)  # the kernel panics, which ends the VM too


class Guest:
    """Supervises the server of the running machine and serves the control port."""

    def __init__(self, parameters: BootParameters) -> None:
        self._parameters = parameters
        self._selector = selectors.DefaultSelector()
        self._lines = LineReader()
        control = machine.port_device(CONTROL_PORT)
        if control is None:
            raise machine.MachineError(f"the machine has no virtio-serial port {CONTROL_PORT}")
        # its own file description: the selector watches it for reading only
        self._control = os.open(control, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._control_writer = BoundedWriter(self._control, _MOST_PENDING_CONTROL)
        log = machine.port_device(LOG_PORT) or Path("/dev/console")
        self._log = BoundedWriter(
            os.open(log, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), _MOST_PENDING_LOG
        )
        self._identity: Identity | None = None
        self._kill_at: float | None = None
        self._server_status: int | None = None
        self._wakeup, wakeup_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakeup_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._server, self._channel, self._output = _start_server()

    def run(self) -> None:
        """Supervise until the server has ended."""
        register = self._selector.register
        register(self._wakeup, selectors.EVENT_READ, self._reap)
        register(self._channel, selectors.EVENT_READ, self._read_server_channel)
        register(self._output, selectors.EVENT_READ, self._forward_output)
        register(self._control, selectors.EVENT_READ, self._read_control_port)
        while self._server_status is None:
            pending = self._log.pending or self._control_writer.pending
            timeout = 0.05 if pending else None
            if self._kill_at is not None:
                timeout = min(timeout or 1.0, max(0.0, self._kill_at - time.monotonic()))
            for key, _ in self._selector.select(timeout):
                key.data()
            self._log.flush()
            self._control_writer.flush()
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                os.kill(self._server, signal.SIGKILL)
        with contextlib.suppress(KeyError, ValueError):  # output that was not read yet
            while self._forward_output():
                pass
        self._send("exited", status=self._server_status)

    def _read_control_port(self) -> None:
        try:
            data = os.read(self._control, 65536)
        except BlockingIOError:
            return
        if not data:  # the host has not opened the port
            time.sleep(_DISCONNECTED_SECONDS)
            return
        for line in self._lines.feed(data):
            try:
                kind, body = parse_message(line)
                if kind == "identity":
                    self._apply_identity(Identity.parse(body))
                elif kind == "shutdown":
                    self._shut_down(body)
                else:
                    raise GuestProtocolError("a guest accepts only identity and shutdown")
            except GuestProtocolError as error:
                self._send("refused", message=str(error))

    def _apply_identity(self, identity: Identity) -> None:
        if self._identity is not None:
            raise GuestProtocolError("this guest already has an identity")
        apply(identity)
        _log_to_console(f"{describe_machine()}, identified")
        self._identity = identity
        handover = {
            "entropy": identity.entropy.hex(),
            "enrolment_secret": identity.enrolment_secret,
            "environment": {
                "LOG_LEVEL": self._parameters.log_level,
                **identity.environment,
                "AGENT_ID": identity.agent_id,
                "GATEWAY_URL": self._parameters.gateway_url,
                "AGENT_HOST": "0.0.0.0",  # noqa: S104 - the VM has one address; the host's rules restrict access
                "AGENT_PORT": str(AGENT_PORT),
            },
        }
        self._channel.setblocking(True)
        self._channel.sendall(json.dumps(handover).encode() + b"\n")
        self._channel.setblocking(False)
        self._send("identified", agent_id=identity.agent_id)

    def _shut_down(self, body: dict[str, object]) -> None:
        grace = body.get("grace", _KILL_AFTER_SECONDS)
        if isinstance(grace, bool) or not isinstance(grace, int | float) or not 0 <= grace <= 3600:
            raise GuestProtocolError("shutdown.grace must be 0 to 3600 seconds")
        self._kill_at = time.monotonic() + grace
        os.kill(self._server, signal.SIGTERM)

    def _read_server_channel(self) -> None:
        try:
            data = self._channel.recv(4096)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self._selector.unregister(self._channel)
        for line in data.splitlines(keepends=True):
            if line == UP:
                _log_boot_step("server")
                machine.protect_server_from_oom()
                self._send("waiting-for-identity", protocol=PROTOCOL)
            elif line == SERVING and self._identity is not None:
                self._send("ready", agent_id=self._identity.agent_id)

    def _forward_output(self) -> bool:
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
            os.read(self._wakeup, 4096)
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._server:
                    self._server_status = os.waitstatus_to_exitcode(status)

    def _send(self, kind: str, **body: object) -> None:
        self._control_writer.write(message(kind, **body))


def _log_boot_step(step: str) -> None:
    """Log on the serial console when a step of the boot ended, to diagnose slow boots."""
    _log_to_console(f"{step} after {time.clock_gettime(time.CLOCK_BOOTTIME):.2f} s")


def _log_to_console(text: str) -> None:
    print(f"guest: {text}", file=sys.stderr, flush=True)  # noqa: T201


def _command() -> tuple[str, ...]:
    """Return the command that starts the launcher as root, which starts the server unprivileged."""
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
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    command = _command()
    pid = os.posix_spawn(
        command[0],
        command,
        _ENVIRONMENT,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, null, 0),
            (os.POSIX_SPAWN_DUP2, writer, 1),
            (os.POSIX_SPAWN_DUP2, writer, 2),
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), CHANNEL),
        ],
        setsigdef=[signal.SIGCHLD, signal.SIGPIPE],
    )
    theirs.close()
    os.close(writer)
    os.close(null)
    ours.setblocking(False)
    os.set_blocking(output, False)
    return pid, ours, output
