"""Clones of a process draw randomness of their own once they are reseeded, and the same randomness when they are not.

A snapshot of a VM copies a process with its memory and its process id. A fork into a process id namespace of its own
does the same: the child is process 1, as its parent was, so that no library notices the fork by its process id.
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
draw()  # all generators have a state, as in a snapshot
for entropy in sys.argv[1:]:
    between = os.fork()  # a process may do this once, and draws nothing itself
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
    """Return what each clone of one process drew, given its entropy (`-`: none)."""
    command = ["unshare", "--pid", "--fork", sys.executable, "-c", CLONES, *entropies]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.root
def test_clones_draw_different_randomness_after_they_were_reseeded() -> None:
    first, second = clones("11" * 32, "22" * 32)
    for generator in ("random", "ssl", "cryptography"):
        assert first[generator] != second[generator], f"{generator} is the same in two clones"


@pytest.mark.root
def test_without_being_reseeded_clones_draw_the_same() -> None:
    """The control: so this is what the reseeding is for. Python's `random` notices a fork by itself."""
    first, second = clones("-", "-")
    for generator in ("ssl", "cryptography"):
        assert first[generator] == second[generator]
