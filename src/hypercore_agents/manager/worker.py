"""One worker process: `python -m hypercore_agents.manager.worker DESCRIPTOR`, started by `workers.py` only.

Standard input is a pipe from the parent. When it closes, the parent is gone; the worker ends too and leaves the agents
running for the next manager. The line `last` marks the last worker to end.
"""

import asyncio
import os
import sys
from pathlib import Path

import uvloop

from hypercore_agents.compute.base import SandboxRefused
from hypercore_agents.http.serve import inherited
from hypercore_agents.http.workers import REFUSED
from hypercore_agents.kit.environment import SettingError
from hypercore_agents.manager.app import run_on
from hypercore_agents.manager.composition import SharedAddress
from hypercore_agents.manager.settings import ManagerSettings
from hypercore_agents.manager.workers import LAST
from hypercore_agents.observability.logging import configure_logging
from hypercore_agents.security.sealing import SealingError


def main() -> None:
    """Serve until SIGTERM, SIGINT or the end of standard input. Exits with REFUSED if a setting cannot be used."""
    try:
        uvloop.run(_serve(int(sys.argv[1]), Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])))
    except (SettingError, SealingError, SandboxRefused) as error:
        sys.stderr.write(f"hypercore-agents: {error}\n")
        raise SystemExit(REFUSED) from None


async def _serve(descriptor: int, folder: Path) -> None:
    settings = ManagerSettings()
    configure_logging("manager", level=settings.log_level, format=settings.log_format)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    received = bytearray()

    def listen() -> None:
        piece = os.read(0, 64)
        received.extend(piece)
        if not piece:
            loop.remove_reader(0)
            stop.set()

    loop.add_reader(0, listen)
    try:
        shared = SharedAddress(metrics_folder=folder, ends_last=lambda: LAST in received, stop=stop)
        await run_on(inherited(descriptor), settings, shared=shared)
    finally:
        loop.remove_reader(0)


if __name__ == "__main__":
    main()
