"""Clones of a process draw different random numbers after reseeding, and the same ones without it.

A snapshot of a VM copies a process with its memory and its pid. A fork into a new pid namespace does the same: the
child has pid 1, as its parent had, so no library detects the fork by the pid.
"""

import json
import subprocess
import sys

import pytest

CLONES = """
import ctypes, json, os, random, ssl, sys
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypercore_agents.agent.guest.standby import reseed

def draw():
    return {
        "random": random.random(),
        "ssl": ssl.RAND_bytes(16).hex(),
        "cryptography": X25519PrivateKey.generate().private_bytes_raw().hex(),
    }

assert os.getpid() == 1
draw()  # initializes all generators, as in a snapshot
for entropy in sys.argv[1:]:
    between = os.fork()  # a process can do this once, and draws nothing itself
    if between == 0:
        assert ctypes.CDLL(None).unshare(0x20000000) == 0  # CLONE_NEWPID, for the next child
        clone = os.fork()
        if clone == 0:
            assert os.getpid() == 1
            if entropy != "-":
                reseed(bytes.fromhex(entropy))
            print(json.dumps(draw()), flush=True)
            os._exit(0)
        os._exit(os.waitpid(clone, 0)[1] != 0)
    assert os.waitpid(between, 0)[1] == 0
"""


def clones(*entropies: str) -> list[dict[str, object]]:
    """Return the numbers that each clone of one process drew, given its entropy (`-`: none)."""
    command = ["unshare", "--pid", "--fork", sys.executable, "-c", CLONES, *entropies]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.root
def test_clones_draw_different_numbers_after_reseeding() -> None:
    first, second = clones("11" * 32, "22" * 32)
    for generator in ("random", "ssl", "cryptography"):
        assert first[generator] != second[generator], f"{generator} is the same in two clones"


@pytest.mark.root
def test_clones_draw_the_same_numbers_without_reseeding() -> None:
    """The control: reseeding is what makes the difference. Python's `random` detects a fork by itself."""
    first, second = clones("-", "-")
    for generator in ("ssl", "cryptography"):
        assert first[generator] == second[generator]
