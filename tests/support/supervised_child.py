"""A child process for tests of the supervisor of `up`: the simulator on a free port."""

import os

from hypercore_agents.cli.supervisor import Child
from support.ports import free_address


def simulator() -> Child:
    address = free_address()
    environment = {**os.environ, "SIMULATOR_LISTEN": address}
    return Child("simulator", ["simulator"], environment, f"http://{address}/health")
