"""What host and guest of a microVM say to each other: the kernel command line and the control port.

The **kernel command line** carries only `hypercore.*` keys that everybody may know (`BootParameters`); a template and
its clones share it. The **control port** (virtio-serial, root-only in the guest) carries one JSON object per line, each
with one key, the kind of message:

    guest: {"waiting-for-identity": {"protocol": 1}}        booted, server imported; a snapshot is taken here
    host:  {"identity": {...}}                              see `Identity`; the only message with a secret
    guest: {"identified": {"agent_id": ...}}                clock, name and randomness are its own; the server enrols
    guest: {"ready": {"agent_id": ...}}                     enrolled and serving
    host:  {"shutdown": {"grace": SECONDS}}                 drain the server, then power off
    guest: {"exited": {"status": N}}                        the server ended by itself (negative: a signal); powers off
    guest: {"refused": {"message": ...}}                    a line could not be used; nothing was changed

What a guest says is hostile: the host takes kinds that it knows, and acts on none but its own VM.

Stdlib only: pid 1 of the guest imports this, and every module more costs the start of a VM.
Rejected: identity on the kernel command line or a config disk (readable by every process in the guest, and kept in the
snapshot); fw_cfg (readable by root only, but fixed when QEMU starts, so it would be part of the template).
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
"""`serial=` of the virtio-blk device with an empty ext4, made with the features quota and project."""
AGENT_PORT = 8080
"""Port of the agent's server in the guest."""
PROTOCOL = 1
LONGEST_LINE = 65536
_PREFIX = "hypercore."
_LEAST_ENTROPY = 32


class GuestProtocolError(ValueError):
    """A line or a command line is not what this module describes; the message names the field, never a value."""


@dataclass(frozen=True)
class BootParameters:
    """What a guest knows when it boots. Nothing here is secret or a tenant's.

    `address` is eth0's with its prefix (`10.77.0.2/30`), `router` the next hop (often the host's end of the link),
    `gateway_url` where sandboxes reach the gateway.
    """

    address: str
    router: str
    gateway_url: str
    log_level: str = "INFO"

    def command_line(self) -> str:
        """Return the part of the kernel command line that says this."""
        return " ".join(f"{_PREFIX}{name}={value}" for name, value in asdict(self).items())

    @classmethod
    def parse(cls, command_line: str) -> "BootParameters":
        """Read `/proc/cmdline`. Raises GuestProtocolError naming the missing or wrong key."""
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
            raise GuestProtocolError(f"{_PREFIX}address or {_PREFIX}router is no address") from None
        return cls(found["address"], found["router"], found["gateway_url"], found.get("log_level", "INFO"))


@dataclass(frozen=True)
class Identity:
    """What makes a VM this agent's and no clone's. `clock` is Unix seconds, `entropy` at least 32 fresh random bytes.

    `environment` holds the agent's settings, never a secret. `hostname` is a single DNS label.
    """

    agent_id: str
    hostname: str
    clock: float
    entropy: bytes = field(repr=False)
    enrolment_secret: str = field(repr=False)
    environment: Mapping[str, str] = field(default_factory=dict)

    def line(self) -> bytes:
        """Return the message that carries this."""
        return message("identity", **{**asdict(self), "entropy": self.entropy.hex()})

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> "Identity":
        """Check the body of an `identity` message. Raises GuestProtocolError naming the field."""
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
        said = json.loads(line) if len(line) <= LONGEST_LINE else None
    except (ValueError, RecursionError):
        said = None
    if isinstance(said, dict) and len(said) == 1:
        ((kind, body),) = said.items()
        if isinstance(body, dict):
            return kind, body
    raise GuestProtocolError("a control message is one JSON object {KIND: {...}} on a line of at most 64 KiB")
