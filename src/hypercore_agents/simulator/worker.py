"""A worker process of the simulator: `python -m hypercore_agents.simulator.worker`, started by `serve.py` only.

Its argument is an Assignment as JSON. It is not sent through standard input: if the parent were killed before sending
it, the worker would not know which folder to remove. Standard input is a pipe from the parent: when it closes, the
parent has ended, and the worker removes the temporary folder in its place and exits.
"""

import asyncio
import contextlib
import gc
import hashlib
import os
import shutil
import socket
import sys
from pathlib import Path

import uvicorn
from pydantic import BaseModel

from hypercore_agents.http.serve import inherited
from hypercore_agents.observability.logging import configure_logging
from hypercore_agents.simulator.app import Simulator
from hypercore_agents.simulator.connection import Protocol
from hypercore_agents.simulator.counts import Counts
from hypercore_agents.simulator.settings import SimulatorSettings
from hypercore_agents.simulator.shared_state import SharedState


class Assignment(BaseModel):
    """A worker's configuration from the parent. `descriptor` is the inherited listening socket.

    `temporary`: remove `directory` when the simulator ends.
    """

    settings: SimulatorSettings
    directory: Path
    temporary: bool
    descriptor: int
    number: int


def main() -> None:
    """Serve until SIGTERM, SIGINT or the end of standard input."""
    assignment = Assignment.model_validate_json(sys.argv[1])
    configure_logging("simulator", level="WARNING")
    try:
        _work(assignment)
    except OSError:  # another worker may already have removed the folder
        if not _parent_has_ended():
            raise
    finally:
        if assignment.temporary and _parent_has_ended():
            shutil.rmtree(assignment.directory, ignore_errors=True)


def _work(assignment: Assignment) -> None:
    settings = assignment.settings
    shared = SharedState(assignment.directory, settings.record_bytes)
    with (
        contextlib.closing(shared),
        contextlib.closing(Counts(assignment.directory, assignment.number, settings.workers)) as counts,
    ):
        listener = inherited(assignment.descriptor)
        app = Simulator(settings, shared, counts, accepted_keys(settings.api_keys_file))
        # Imported modules never become garbage, and thousands of streams contain no cycles: collect rarely.
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        server = _Server(_configuration(app), settings.grace)
        with contextlib.suppress(KeyboardInterrupt), contextlib.closing(listener):
            uvicorn_loop = server.config.get_loop_factory()
            with asyncio.Runner(loop_factory=uvicorn_loop) as runner:
                runner.run(_serve(server, listener))


def _parent_has_ended() -> bool:
    os.set_blocking(0, False)
    try:
        return os.read(0, 4096) == b""
    except BlockingIOError:
        return False


def accepted_keys(file: Path | None) -> frozenset[bytes] | None:
    """Return the digests of the keys in a file, one per line; None without a file: any key is accepted."""
    if file is None:
        return None
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return frozenset(hashlib.sha256(line.encode()).digest() for line in lines if line)


def _configuration(app: Simulator) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        backlog=4096,
        timeout_keep_alive=75,
    )


async def _serve(server: "_Server", listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    loop.add_reader(0, _stop_if_parent_ended, server)
    try:
        await server.serve(sockets=[listener])
    finally:
        loop.remove_reader(0)


def _stop_if_parent_ended(server: "_Server") -> None:
    if not os.read(0, 4096):
        server.should_exit = True
        asyncio.get_running_loop().remove_reader(0)


class _Server(uvicorn.Server):
    """uvicorn's server, which closes open streams `grace` seconds after the signal without logging errors."""

    def __init__(self, config: uvicorn.Config, grace: float) -> None:
        super().__init__(config)
        self._grace = grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting connections, wait at most `grace` seconds for open streams, then close them."""
        timer = asyncio.get_running_loop().call_later(self._grace, self._abort_all)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _abort_all(self) -> None:
        for protocol in list(self.server_state.connections):
            if isinstance(protocol, Protocol):
                protocol.connection.abort()


if __name__ == "__main__":
    main()
