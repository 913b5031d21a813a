"""Gives a restored machine its own clock, host name and kernel randomness. Runs in pid 1, as root.

A clone resumes with the state of its template: an old clock, and the same name and random state as all other clones. So
before the server receives its agent's identity, the kernel's pool gets fresh entropy and its generator is reseeded at
once (random(4)), and the clock and the host name are set. The server process reseeds its own generators (`standby`).

Standard library only.
"""

import fcntl
import os
import socket
import struct
import time
from pathlib import Path

from hypercore_agents.api.guest import Identity

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207


def apply(identity: Identity) -> None:
    """Apply an identity to this machine. Raises OSError."""
    add_entropy(identity.entropy)
    time.clock_settime(time.CLOCK_REALTIME, identity.clock)
    socket.sethostname(identity.hostname)


def describe_machine() -> str:
    """Return the current host name, boot id and clock, for the console: what two clones must not share.

    The kernel generates the boot id when it is first read. Nothing in a template reads it, so it comes from the
    reseeded generator and is unique to each clone.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return f"{socket.gethostname()}, boot {_BOOT_ID.read_text().strip()}, {now}"


def add_entropy(entropy: bytes, device: str = "/dev/urandom") -> None:
    """Credit fresh entropy to the kernel's pool and reseed its generator from it (random(4))."""
    descriptor = os.open(device, os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, RNDADDENTROPY, entropy_request(entropy))
        fcntl.ioctl(descriptor, RNDRESEEDCRNG)
    finally:
        os.close(descriptor)


def entropy_request(entropy: bytes) -> bytes:
    """Return `struct rand_pool_info`: bits of entropy, bytes of data, the data padded to whole words."""
    padded = entropy + bytes(-len(entropy) % 4)
    return struct.pack("=ii", len(entropy) * 8, len(padded)) + padded
