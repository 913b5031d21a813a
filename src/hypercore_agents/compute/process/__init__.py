"""Agents as processes of this host, each under a small shim: the backend for development and for one machine.

`backend` is the only door; the modules below it, from the bottom up, all on `compute.host`:

- `records`   what a sandbox's directory holds, and how it is read and written
- `shim`      the process above every agent (a program of its own, started by its path)
- `teardown`  the one way in which anything is undone: a stop, a failed start, a dead manager's leftovers
- `command`   what starts an agent
- `launch`    the one way in which a sandbox starts
- `admission` what is refused
- `observing` what is to be seen of a sandbox
"""

from hypercore_agents.compute.process.backend import ProcessBackend

__all__ = ["ProcessBackend"]
