"""Run the simulator: a parent process that supervises `workers` serving processes (`http/workers.py`)."""

import asyncio
import contextlib
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypercore_agents.http.serve import AddressError, is_loopback, parse_address, raise_descriptor_limit
from hypercore_agents.http.workers import Worker, shared_listeners
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.kit.environment import SettingError, make_state_dir
from hypercore_agents.simulator.settings import SimulatorSettings
from hypercore_agents.simulator.worker import Assignment, accepted_keys


def check_at_start(settings: SimulatorSettings) -> None:
    """Check that the file and folder in the settings are usable. Raises SettingError, which names the variable."""
    try:
        accepted_keys(settings.api_keys_file)
    except (OSError, ValueError) as error:
        raise SettingError(f"SIMULATOR_API_KEYS_FILE: cannot read {settings.api_keys_file}: {error}") from None
    if settings.state_dir is not None:
        make_state_dir(settings.state_dir, "SIMULATOR_STATE_DIR")


def serve(settings: SimulatorSettings, *, announce: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT. Calls `announce(url)` once the address accepts connections.

    Raises SettingError if the address, file or folder of a setting is unusable.
    """
    check_at_start(settings)  # here, so that it is reported once instead of by every worker
    host, port = parse_address(settings.listen, "SIMULATOR_LISTEN")
    if not settings.allow_any_address and not is_loopback(host):
        raise AddressError(
            f"SIMULATOR_LISTEN={settings.listen} would let other machines use the simulator; choose a loopback address "
            "or set allow_any_address"
        )
    raise_descriptor_limit()
    with contextlib.ExitStack() as stack:
        shared = shared_listeners(host, port, settings.workers, "SIMULATOR_LISTEN")
        listeners = [stack.enter_context(each) for each in shared]
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
    workers: list[Worker] = []
    for number, listener in enumerate(listeners):
        assignment = Assignment(
            settings=settings,
            directory=directory,
            temporary=settings.state_dir is None,
            descriptor=listener.fileno(),
            number=number,
        )
        worker = Worker(number, listener, ("hypercore_agents.simulator.worker", assignment.model_dump_json()))
        workers.append(worker)
        tasks.start(f"worker-{number}", worker.supervise())
    try:
        ready()
        await stop.wait()
    finally:
        await tasks.close()
        await asyncio.gather(*(worker.stop(settings.grace + 5) for worker in workers))


def _state_directory(settings: SimulatorSettings, stack: contextlib.ExitStack) -> Path:
    if settings.state_dir is not None:
        # An earlier run's counters, possibly of more workers, must not add to this run's.
        (settings.state_dir / "counts.bin").unlink(missing_ok=True)
        return settings.state_dir.resolve()
    directory = tempfile.mkdtemp(prefix="hypercore-simulator-")
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)
