"""Agents as processes of this host, each under a small shim: the backend for development and for one machine.

`backend` is the only door; the modules below it, from the bottom up:

- `identity`  which process a record means (never a pid alone)
- `records`   what a sandbox's directory holds, and how it is read and written
- `removal`   deletes a directory tree that a hostile agent filled
- `locks`     one operation per agent at a time, across processes
- `users`     a user of its own for every agent, where that is possible
- `limits`    control groups, both versions
- `shim`      the process above every agent (a program of its own, started by its path)
- `teardown`  the one way in which anything is undone: a stop, a failed start, a dead manager's leftovers
- `command`   what starts an agent
- `launch`    the one way in which a sandbox starts
- `admission` what is refused
- `observing` what is to be seen of a sandbox
"""

from hypercore_agents.compute.process.backend import ProcessBackend

__all__ = ["ProcessBackend"]
