"""The agent's server, up but nobody's: everything imported and rehearsed, waiting on a socket for an identity.

pid 1 has the launcher start this unprivileged, before a snapshot is taken. Handing it the identity over an inherited
socket (descriptor 3, through the launcher) keeps `AgentSettings` and its `ENROLMENT_FD` as they are: the secret goes
through a pipe of this process alone, and the settings are built only then. The snapshot holds code and no secret.

What the process itself keeps of randomness is reseeded before any of it is used: Python's `random`, the names of its
temporary files, and the generators
of both copies of OpenSSL, Python's and the one inside `cryptography`, each from its own bytes. The second is easily
forgotten: after a rehearsal all clones made one and the same enrolment key. A copy that cannot be reseeded ends the
server. Known and accepted: clones share the hash seed of `str` and the addresses that the kernel chose at exec.
"""

import contextlib
import gc
import hashlib
import json
import os
import random
import socket
import ssl
import tempfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hypercore_agents.agent.guest.handover import CHANNEL, SERVING, UP
from hypercore_agents.agent.guest.warmup import rehearse

if TYPE_CHECKING:
    from hypercore_agents.agent.server.app import AgentApplication

_LONGEST_HANDOVER = 1 << 20
_LIVES = 2


def main() -> None:
    """Import everything, say that the server is up, wait for the handover, serve to the end."""
    application = warm_up()
    for _ in range(_LIVES):
        rehearse(application)
    channel = socket.socket(fileno=CHANNEL)
    os.set_inheritable(CHANNEL, False)
    gc.collect()
    gc.freeze()  # clones share these pages: the collector must not write to them
    channel.sendall(UP)
    handover = receive(channel)
    reseed(bytes.fromhex(handover["entropy"]))
    serve(handover, application, lambda: _say(channel, SERVING))


def warm_up() -> "AgentApplication":
    """Load and build what serving needs, so that a clone does neither; return the routes."""
    import aiohttp
    import claude_agent_sdk
    import uvicorn.lifespan.on
    import uvicorn.protocols.http.httptools_impl
    import uvloop

    from hypercore_agents.agent.server import app

    del aiohttp, claude_agent_sdk, uvicorn, uvloop
    return app.AgentApplication()


def receive(channel: socket.socket) -> dict[str, Any]:
    """Return the handover: one JSON object on a line. Raises SystemExit when pid 1 closed the socket instead."""
    data = bytearray()
    while not data.endswith(b"\n"):
        part = channel.recv(65536)
        if not part or len(data) > _LONGEST_HANDOVER:
            raise SystemExit("pid 1 sent no identity")
        data += part
    handover: dict[str, Any] = json.loads(data)
    return handover


def reseed(entropy: bytes) -> None:
    """Make this process's own generators differ from those of every other clone."""
    from cryptography.hazmat.bindings._rust import _openssl  # not public: there is no public way

    random.seed(hashlib.sha512(b"random" + entropy).digest())
    tempfile._name_sequence = None  # type: ignore[attr-defined]  # made anew, from the kernel's, at the next name
    ssl.RAND_add(hashlib.sha512(b"openssl" + entropy).digest(), 64.0)
    _openssl.lib.RAND_add(hashlib.sha512(b"cryptography" + entropy).digest(), 64, 64.0)


def serve(handover: Mapping[str, Any], application: "AgentApplication", announce: Callable[[], None]) -> None:
    """Run the agent's server with the environment and the secret that were handed over."""
    import uvloop

    from hypercore_agents.agent.server.app import run
    from hypercore_agents.agent.settings import AgentSettings

    reader, writer = os.pipe()
    os.write(writer, handover["enrolment_secret"].encode())
    os.close(writer)
    os.environ.update(handover["environment"])
    os.environ["ENROLMENT_FD"] = str(reader)
    uvloop.run(run(AgentSettings(), announce=announce, application=application))


def _say(channel: socket.socket, word: bytes) -> None:
    with contextlib.suppress(OSError):
        channel.sendall(word)


if __name__ == "__main__":
    main()
