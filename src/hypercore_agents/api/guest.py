"""The protocol between a microVM's host and its guest: the kernel command line and the control port.

The **kernel command line** carries only `hypercore.*` keys without secrets (`BootParameters`); a template and its
clones share it. The **control port** (virtio-serial, readable only by root in the guest) carries one JSON object per
line, each with one key, the kind of message:

    guest: {"waiting-for-identity": {"protocol": 1}}        booted, server imported; a snapshot is taken here
    host:  {"identity": {...}}                              see `Identity`; the only message with a secret
    guest: {"identified": {"agent_id": ...}}                has its own clock, name and randomness; the server enrols
    guest: {"ready": {"agent_id": ...}}                     enrolled and serving
    host:  {"shutdown": {"grace": SECONDS}}                 drain the server, then power off
    guest: {"exited": {"status": N}}                        the server exited (negative: by a signal); powers off
    guest: {"refused": {"message": ...}}                    a line was invalid; nothing was changed

Messages from a guest are untrusted: the host accepts known kinds only, and a message affects only the guest's own VM.

Standard library only: pid 1 of the guest imports this module, and every further module delays the start of a VM.
Rejected: the identity on the kernel command line or on a config disk (readable by every process in the guest, and part
of the snapshot); fw_cfg (readable by root only, but set when QEMU starts, so it would be part of the template).
"""

import ipaddress
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

CONTROL_PORT = "hypercore.control"
"""Name of the virtio-serial port that carries the lines above."""
LOG_PORT = "hypercore.log"
"""Name of the virtio-serial port to which the agent's output goes; without it, output goes to the serial console."""
ROOT_SERIAL = "hypercore-root"
"""`serial=` of the virtio-blk device with the image's read-only root."""
SCRATCH_SERIAL = "hypercore-scratch"
"""`serial=` of the virtio-blk device with an empty ext4, with the features quota and project."""
AGENT_PORT = 8080
"""Port of the agent's server in the guest."""
PROTOCOL = 1
LONGEST_LINE = 65536
_PREFIX = "hypercore."
_LEAST_ENTROPY = 32


class GuestProtocolError(ValueError):
    """A line or a command line is invalid; the message names the field, never a value."""


@dataclass(frozen=True)
class BootParameters:
    """Parameters of a booting guest. They contain no secrets and no data of users.

    `address` is eth0's with its prefix (`10.77.0.2/30`), `router` the next hop (often the host's end of the link),
    `gateway_url` where sandboxes reach the gateway.
    """

    address: str
    router: str
    gateway_url: str
    log_level: str = "INFO"

    def command_line(self) -> str:
        """Return these parameters as a part of the kernel command line."""
        return " ".join(f"{_PREFIX}{name}={value}" for name, value in asdict(self).items())

    @classmethod
    def parse(cls, command_line: str) -> "BootParameters":
        """Parse `/proc/cmdline`. Raises GuestProtocolError, which names the missing or invalid key."""
        found = dict(
            word.removeprefix(_PREFIX).split("=", 1)
            for word in command_line.split()
            if word.startswith(_PREFIX) and "=" in word
        )
        for name in ("address", "router", "gateway_url"):
            if not found.get(name):
                raise GuestProtocolError(f"the kernel command line lacks {_PREFIX}{name}")
        try:
            ipaddress.ip_interface(found["address"])
            ipaddress.ip_address(found["router"])
        except ValueError:
            raise GuestProtocolError(f"{_PREFIX}address or {_PREFIX}router is not an address") from None
        return cls(found["address"], found["router"], found["gateway_url"], found.get("log_level", "INFO"))


@dataclass(frozen=True)
class Identity:
    """What turns a clone into a particular agent. `clock` is in Unix seconds, `entropy` at least 32 new random bytes.

    `environment` holds the agent's settings, never a secret. `hostname` is a single DNS label.
    """

    agent_id: str
    hostname: str
    clock: float
    entropy: bytes = field(repr=False)
    enrolment_secret: str = field(repr=False)
    environment: Mapping[str, str] = field(default_factory=dict)

    def line(self) -> bytes:
        """Return the message with this identity."""
        return message("identity", **{**asdict(self), "entropy": self.entropy.hex()})

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> "Identity":
        """Check the body of an `identity` message. Raises GuestProtocolError, which names the field."""
        for name in ("agent_id", "hostname", "entropy", "enrolment_secret"):
            if not isinstance(body.get(name), str) or not body[name]:
                raise GuestProtocolError(f"identity.{name} must be a non-empty string")
        hostname = body["hostname"]
        if len(hostname) > 63 or not hostname.isascii() or not hostname.replace("-", "a").isalnum():
            raise GuestProtocolError("identity.hostname must be one DNS label")
        clock = body.get("clock")
        if isinstance(clock, bool) or not isinstance(clock, int | float) or not 1e9 < clock < 1e11:
            raise GuestProtocolError("identity.clock must be Unix seconds")
        try:
            entropy = bytes.fromhex(body["entropy"])
        except ValueError:
            raise GuestProtocolError("identity.entropy must be hexadecimal") from None
        if len(entropy) < _LEAST_ENTROPY:
            raise GuestProtocolError(f"identity.entropy must be at least {_LEAST_ENTROPY} bytes")
        environment = body.get("environment", {})
        if not isinstance(environment, dict) or not all(
            isinstance(value, str) and name and "=" not in name and "\0" not in name + value
            for name, value in environment.items()
        ):
            raise GuestProtocolError("identity.environment must map names to strings")
        return cls(body["agent_id"], hostname, float(clock), entropy, body["enrolment_secret"], environment)


def message(kind: str, **body: Any) -> bytes:
    """Return one line of the control port."""
    return json.dumps({kind: body}, separators=(",", ":")).encode() + b"\n"


def parse_message(line: bytes) -> tuple[str, dict[str, Any]]:
    """Return kind and body of one line. Raises GuestProtocolError."""
    try:
        parsed = json.loads(line) if len(line) <= LONGEST_LINE else None
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, dict) and len(parsed) == 1:
        ((kind, body),) = parsed.items()
        if isinstance(body, dict):
            return kind, body
    raise GuestProtocolError("a control message is one JSON object {KIND: {...}} on a line of at most 64 KiB")
