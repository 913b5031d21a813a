"""`python -m hypercore_agents.simulator`: run the simulator with settings from `SIMULATOR_*`; used by tests.

Prints its base URL on one line once it accepts connections. Users run `hypercore-agents simulator` instead.
"""

import sys

from hypercore_agents.http.serve import AddressError
from hypercore_agents.simulator.serve import serve
from hypercore_agents.simulator.settings import SimulatorSettings


def _announce(url: str) -> None:
    sys.stdout.write(f"{url}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        serve(SimulatorSettings(), announce=_announce)
    except (AddressError, OSError) as error:
        sys.exit(f"simulator: {error}")
