"""Making a restored machine its own: clock, name and the kernel's randomness. Run by pid 1 as root; stdlib only.

A clone wakes with everything that its template had: the clock of then, one name and one random state for all clones.
So before the server hears of its agent: the clock is set, the name is set, the kernel's pool gets fresh entropy and
its generator is reseeded at once (random(4)), and the boot id becomes another. The server process reseeds what it keeps
for itself (`waiting.py`).
"""

import fcntl
import os
import socket
import struct
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from hypercore_agents.api.guest import Identity

RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_OWN_BOOT_ID = Path("/run/boot_id")


def take(identity: Identity, *, bind: Callable[[str, str], None]) -> None:
    """Make this machine `identity`'s. `bind` mounts one path over another. Raises OSError."""
    add_entropy(identity.entropy)
    time.clock_settime(time.CLOCK_REALTIME, identity.clock)
    socket.sethostname(identity.hostname)
    _OWN_BOOT_ID.write_text(f"{uuid.UUID(bytes=os.urandom(16), version=4)}\n")
    bind(str(_OWN_BOOT_ID), _BOOT_ID)


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
