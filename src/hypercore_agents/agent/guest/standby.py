"""The standby server: an agent's server that is imported and warmed up, and waits on a socket for its identity.

pid 1 has the launcher start it unprivileged, before a snapshot is taken. The identity arrives over an inherited socket
(descriptor 3, through the launcher). `AgentSettings` are built only then, and the secret goes through a pipe within
this process to `ENROLMENT_FD`, as without a standby. The snapshot holds code and no secret.

The process's own random state is reseeded before it is used: Python's `random`, the names of temporary files, and the
generators of both copies of OpenSSL, Python's and the one inside `cryptography`, each from its own bytes. Without the
second, all clones generated the same enrolment key after the warm-up. A generator that cannot be reseeded ends the
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
from hypercore_agents.agent.guest.warmup import warm_up

if TYPE_CHECKING:
    from hypercore_agents.agent.server.app import AgentApplication

_LONGEST_HANDOVER = 1 << 20
_WARM_UPS = 2


def main() -> None:
    """Import all modules, warm up, report that the server is up, wait for the identity, and serve until the end."""
    application = load_application()
    for _ in range(_WARM_UPS):
        warm_up(application)
    channel = socket.socket(fileno=CHANNEL)
    os.set_inheritable(CHANNEL, False)
    gc.collect()
    gc.freeze()  # clones share these pages, so the collector must not write to them
    channel.sendall(UP)
    handover = receive_handover(channel)
    reseed(bytes.fromhex(handover["entropy"]))
    serve(handover, application, lambda: _send(channel, SERVING))


def load_application() -> "AgentApplication":
    """Import the modules that serving needs, so that a clone does not; return the application with its routes."""
    import aiohttp
    import claude_agent_sdk
    import uvicorn.lifespan.on
    import uvicorn.protocols.http.httptools_impl
    import uvloop

    from hypercore_agents.agent.server import app

    del aiohttp, claude_agent_sdk, uvicorn, uvloop
    return app.AgentApplication()


def receive_handover(channel: socket.socket) -> dict[str, Any]:
    """Return the handover, one line of JSON. Raises SystemExit if pid 1 closes the socket."""
    data = bytearray()
    while not data.endswith(b"\n"):
        part = channel.recv(65536)
        if not part or len(data) > _LONGEST_HANDOVER:
            raise SystemExit("pid 1 sent no complete identity")
        data += part
    handover: dict[str, Any] = json.loads(data)
    return handover


def reseed(entropy: bytes) -> None:
    """Reseed this process's random generators, so that they differ from those of other clones."""
    from cryptography.hazmat.bindings._rust import _openssl  # there is no public interface

    random.seed(hashlib.sha512(b"random" + entropy).digest())
    tempfile._name_sequence = None  # type: ignore[attr-defined]  # recreated from the kernel's randomness at the next name
    ssl.RAND_add(hashlib.sha512(b"openssl" + entropy).digest(), 64.0)
    _openssl.lib.RAND_add(hashlib.sha512(b"cryptography" + entropy).digest(), 64, 64.0)


def serve(handover: Mapping[str, Any], application: "AgentApplication", announce: Callable[[], None]) -> None:
    """Run the agent's server with the environment and the secret of the handover."""
    import uvloop

    from hypercore_agents.agent.server.app import run
    from hypercore_agents.agent.settings import AgentSettings

    reader, writer = os.pipe()
    os.write(writer, handover["enrolment_secret"].encode())
    os.close(writer)
    os.environ.update(handover["environment"])
    os.environ["ENROLMENT_FD"] = str(reader)
    uvloop.run(run(AgentSettings(), announce=announce, application=application))


def _send(channel: socket.socket, message: bytes) -> None:
    with contextlib.suppress(OSError):
        channel.sendall(message)


if __name__ == "__main__":
    main()
