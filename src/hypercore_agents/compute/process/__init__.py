"""Agents as processes of this host, each under a small shim: the backend for development and for a single machine.

`backend` is the entry point. The modules below it, from the bottom up, all of them on top of `compute.host`:

- `records`   the record, exit file and directory of a sandbox
- `shim`      the process above every agent (a separate program, started by its path)
- `teardown`  removes a sandbox: for a stop, after a failed start, or after its manager died
- `command`   the command that starts an agent
- `launch`    starts a sandbox
- `admission` the requests that are refused
"""

from hypercore_agents.compute.process.backend import ProcessBackend

__all__ = ["ProcessBackend"]
