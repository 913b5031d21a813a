"""Running the simulator: a parent that serves nothing, and `workers` processes that do.

Each worker has its own listening socket on the one address (SO_REUSEPORT: the kernel spreads connections evenly). The
parent opened them and keeps them open, so connections that arrive while a dead worker is being replaced wait instead
of being refused. Rejected: one shared socket, where the first worker to wake takes most connections.
"""

import asyncio
import contextlib
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import structlog

from hypercore_agents.http.serve import AddressError, is_loopback, parse_address, raise_descriptor_limit
from hypercore_agents.kit.tasks import Tasks
from hypercore_agents.simulator.settings import SimulatorSettings
from hypercore_agents.simulator.worker import Assignment, accepted_keys

_log = structlog.get_logger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
_SETTLED = 10.0


def serve(settings: SimulatorSettings, *, announce: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT. `announce(url)` is called once the address accepts connections.

    Raises AddressError when the address cannot be used, OSError when the file of keys cannot be read.
    """
    accepted_keys(settings.api_keys_file)  # say now what every worker would say later
    host, port = parse_address(settings.listen, "SIMULATOR_LISTEN")
    if not settings.allow_any_address and not is_loopback(host):
        raise AddressError(
            f"SIMULATOR_LISTEN={settings.listen} would let other machines use the simulator; choose a loopback address "
            "or set allow_any_address"
        )
    raise_descriptor_limit()
    with contextlib.ExitStack() as stack:
        listeners = _listeners(host, port, settings.workers, stack)
        directory = _state_directory(settings, stack)
        bound_host, bound_port = listeners[0].getsockname()[:2]
        url = f"http://[{bound_host}]:{bound_port}" if ":" in bound_host else f"http://{bound_host}:{bound_port}"
        asyncio.run(_supervise(settings, directory, listeners, lambda: announce(url) if announce else None))


async def _supervise(
    settings: SimulatorSettings, directory: Path, listeners: list[socket.socket], ready: Callable[[], None]
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, stop.set)
    tasks = Tasks("simulator")
    for number, listener in enumerate(listeners):
        assignment = Assignment(
            settings=settings,
            directory=directory,
            temporary=settings.state_dir is None,
            descriptor=listener.fileno(),
            number=number,
        )
        tasks.start(f"worker-{number}", _keep_alive(assignment, settings.grace))
    try:
        ready()
        await stop.wait()
    finally:
        await tasks.close()


async def _keep_alive(assignment: Assignment, grace: float) -> None:
    """Run a worker, and another one whenever it dies; cancelled, stop it."""
    loop = asyncio.get_running_loop()
    pause = _FIRST_PAUSE
    while True:
        started = loop.time()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "hypercore_agents.simulator.worker",
            stdin=asyncio.subprocess.PIPE,
            pass_fds=(assignment.descriptor,),
        )
        try:
            assert process.stdin is not None
            process.stdin.write(assignment.model_dump_json().encode() + b"\n")
            status = await process.wait()
        except asyncio.CancelledError:
            await _stop(process, grace)
            raise
        pause = _FIRST_PAUSE if loop.time() - started > _SETTLED else min(2 * pause, _LONGEST_PAUSE)
        _log.error("worker.died", number=assignment.number, status=status, again_in_seconds=pause)
        await asyncio.sleep(pause)


async def _stop(process: asyncio.subprocess.Process, grace: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(grace + 5):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _listeners(host: str, port: int, count: int, stack: contextlib.ExitStack) -> list[socket.socket]:
    try:
        # Alone first: sockets that share an address would not notice a simulator that already runs there.
        with _bound(host, port) as probe:
            port = probe.getsockname()[1]
        listeners = [stack.enter_context(_bound(host, port, shared=True)) for _ in range(count)]
        for listener in listeners:
            listener.listen(4096)
    except OSError as error:
        raise AddressError(
            f"cannot listen on {host}:{port} ({error.strerror}); set SIMULATOR_LISTEN to a free address"
        ) from error
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


def _state_directory(settings: SimulatorSettings, stack: contextlib.ExitStack) -> Path:
    if settings.state_dir is not None:
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Counts of an earlier run, perhaps with more workers, are not this run's.
        (settings.state_dir / "counts.bin").unlink(missing_ok=True)
        return settings.state_dir.resolve()
    directory = tempfile.mkdtemp(prefix="hypercore-simulator-")
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)
