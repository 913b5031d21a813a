"""Runs several manager processes behind one address (WORKER_COUNT), with `http/workers.py`.

Everything that the workers must agree on is in the store: quotas, placement, limits, the leader.

At shutdown all workers but one end first, and only the last one may stop the agents (STOP_AGENTS_ON_EXIT): any other
worker still running would take the lease and refill the pool. All workers write their metrics into one folder; each
worker's `/metrics` returns the sums, which include the counts of workers that have died.
"""

import asyncio
import contextlib
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import uvloop

from hypercore_agents.http.serve import parse_address
from hypercore_agents.http.workers import REFUSED, Worker, shared_listeners
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.manager.app import REQUESTS_GRACE, announce, check_at_start, run
from hypercore_agents.manager.composition import EXIT_SECONDS
from hypercore_agents.manager.settings import ManagerSettings
from hypercore_agents.observability.metrics import forget_process

LAST = b"last\n"
"""Line that the parent writes to the last worker before it terminates it."""

_STOP_SECONDS = REQUESTS_GRACE + 5
_LAST_SECONDS = REQUESTS_GRACE + EXIT_SECONDS + 5


def serve(settings: ManagerSettings) -> None:
    """Serve until SIGTERM. Raises SettingError or SealingError when a setting cannot be used."""
    if settings.worker_count == 1:
        uvloop.run(run(settings))
        return
    announce(settings)
    asyncio.run(check_at_start(settings))  # one message, not one per worker
    with contextlib.ExitStack() as stack:
        address = parse_address(settings.listen_addr, "LISTEN_ADDR")
        shared = shared_listeners(*address, settings.worker_count, "LISTEN_ADDR")
        listeners = [stack.enter_context(each) for each in shared]
        folder = stack.enter_context(_metrics_folder(settings, listeners[0]))
        asyncio.run(_supervise(settings, listeners, folder))


async def _supervise(settings: ManagerSettings, listeners: list[socket.socket], folder: Path) -> None:
    stop = asyncio.Event()
    refused = asyncio.Event()
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, stop.set)

    def refuse() -> None:
        refused.set()
        stop.set()

    tasks = Tasks("workers")
    workers = [
        Worker(
            number,
            listener,
            ("hypercore_agents.manager.worker", str(listener.fileno())),
            # prometheus_client reads its folder from the environment, when it is imported.
            environment={"PROMETHEUS_MULTIPROC_DIR": str(folder)},
            on_death=lambda pid: forget_process(folder, pid),
            on_refusal=refuse,
        )
        for number, listener in enumerate(listeners)
    ]
    for worker in workers:
        tasks.start(f"worker-{worker.number}", worker.supervise())
    try:
        await stop.wait()
    finally:
        await tasks.close()
        last = next((worker for worker in workers if worker.running), workers[0])
        await asyncio.gather(*(worker.stop(_STOP_SECONDS) for worker in workers if worker is not last))
        await last.stop(_LAST_SECONDS, final_input=LAST)
    if refused.is_set():
        raise SystemExit(REFUSED)


@contextlib.contextmanager
def _metrics_folder(settings: ManagerSettings, listener: socket.socket) -> Iterator[Path]:
    """Create an empty folder, named after the address, so that one left by a killed parent is found and emptied."""
    folder = settings.state_dir.absolute() / "metrics" / str(listener.getsockname()[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
