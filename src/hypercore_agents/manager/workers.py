"""Several manager processes behind one address (WORKER_COUNT): a parent that serves nothing, and workers that do.

Each worker has its own listening socket on the one address (SO_REUSEPORT: the kernel spreads connections evenly). The
parent opened them and keeps them open, so connections that arrive while a dead worker is being replaced wait instead
of being refused. What the workers must agree on is in the store: quotas, placement, limits, and who drives agents.

All but one end first, and only the last may stop the agents (STOP_AGENTS_ON_EXIT): a worker that went on would take
the lease and fill the pool again. The metrics of all are in one folder; each worker's `/metrics` tells the sum, and
what a dead worker counted stays counted.

Rejected: one shared socket, where the first worker to wake takes most connections.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import structlog
import uvloop

from hypercore_agents.http.serve import AddressError, parse_address
from hypercore_agents.kit.tasks import Tasks
from hypercore_agents.manager.app import EXIT_SECONDS, REQUESTS_GRACE, announce, run
from hypercore_agents.manager.settings import ManagerSettings
from hypercore_agents.observability.metrics import forget_process
from hypercore_agents.security.sealing import KeyRing
from hypercore_agents.store.database import Database
from hypercore_agents.store.schema import migrate

_log = structlog.get_logger(__name__)

LAST = b"last\n"
"""What the parent writes to the worker that ends last, before it asks it to end."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
_SETTLED = 10.0
_STOP_SECONDS = REQUESTS_GRACE + 5
_LAST_SECONDS = REQUESTS_GRACE + EXIT_SECONDS + 5


def serve(settings: ManagerSettings) -> None:
    """Serve until SIGTERM. Raises AddressError, SealingError or DatabaseUrlError when a setting cannot be used."""
    if settings.worker_count == 1:
        uvloop.run(run(settings))
        return
    announce(settings)
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    KeyRing.load_or_create(settings.key_path)
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(each) for each in _listeners(settings)]
        folder = stack.enter_context(_metrics_folder(settings, listeners[0]))
        asyncio.run(_supervise(settings, listeners, folder))


class Worker:
    """One place among the workers: a socket, and whichever process serves it now."""

    def __init__(self, number: int, listener: socket.socket, folder: Path) -> None:
        self.number = number
        self.process: asyncio.subprocess.Process | None = None
        self._listener = listener
        self._folder = folder

    async def keep_alive(self) -> None:
        """Run a process, and another one whenever it dies. Cancelled, it leaves the process to `stop`."""
        loop = asyncio.get_running_loop()
        pause = _FIRST_PAUSE
        while True:
            started = loop.time()
            self.process = await self._start()
            status = await self.process.wait()
            forget_process(self._folder, self.process.pid)
            pause = _FIRST_PAUSE if loop.time() - started > _SETTLED else min(2 * pause, _LONGEST_PAUSE)
            _log.error("worker.died", number=self.number, status=status, again_in_seconds=pause)
            await asyncio.sleep(pause)

    @property
    def lives(self) -> bool:
        """Whether a process serves the socket."""
        return self.process is not None and self.process.returncode is None

    async def stop(self, seconds: float, *, last: bool = False) -> None:
        """Have the process end, by force after `seconds`; the kernel then gives its connections to the others."""
        self._listener.close()
        process = self.process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError, ConnectionError):
            if last and process.stdin is not None:
                process.stdin.write(LAST)
                await process.stdin.drain()
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), seconds)
        except TimeoutError:
            _log.error("worker.killed", number=self.number, after_seconds=seconds)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        descriptor = self._listener.fileno()
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "hypercore_agents.manager.worker",
            str(descriptor),
            stdin=asyncio.subprocess.PIPE,
            pass_fds=(descriptor,),
            # prometheus_client takes its folder from the environment, when it is imported.
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(self._folder)},
        )


async def _supervise(settings: ManagerSettings, listeners: list[socket.socket], folder: Path) -> None:
    database = Database(settings.store_url)
    try:
        await migrate(database)  # a store that cannot be used is one message, not one per worker
    finally:
        await database.close()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, stop.set)
    tasks = Tasks("workers")
    workers = [Worker(number, listener, folder) for number, listener in enumerate(listeners)]
    for worker in workers:
        tasks.start(f"worker-{worker.number}", worker.keep_alive())
    try:
        await stop.wait()
    finally:
        await tasks.close()
        last = next((worker for worker in workers if worker.lives), workers[0])
        await asyncio.gather(*(worker.stop(_STOP_SECONDS) for worker in workers if worker is not last))
        await last.stop(_LAST_SECONDS, last=True)


def _listeners(settings: ManagerSettings) -> list[socket.socket]:
    host, port = parse_address(settings.listen_addr, "LISTEN_ADDR")
    with contextlib.ExitStack() as stack:
        try:
            # Alone first: sockets that share an address would not notice a manager that already runs there.
            with _bound(host, port) as probe:
                port = probe.getsockname()[1]
            listeners = [stack.enter_context(_bound(host, port, shared=True)) for _ in range(settings.worker_count)]
            for listener in listeners:
                listener.listen(4096)
        except OSError as error:
            raise AddressError(
                f"cannot listen on {host}:{port} ({error.strerror}); set LISTEN_ADDR to a free address"
            ) from error
        stack.pop_all()
    return listeners


def _bound(host: str, port: int, *, shared: bool = False) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


@contextlib.contextmanager
def _metrics_folder(settings: ManagerSettings, listener: socket.socket) -> Iterator[Path]:
    """Give an empty folder that is this address' own, so that one left by a killed parent is found and emptied."""
    folder = settings.state_dir.absolute() / "metrics" / str(listener.getsockname()[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
