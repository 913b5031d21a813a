"""The launcher: the only part of an agent that has rights, and so the smallest one.

A root process (`python -m hypercore_agents.agent.launcher --help`) that starts the agent server as an unprivileged user
and then, asked over one inherited Unix socket, starts and kills what sessions run. Modules, from the bottom up:

- `kernel`   system calls that Python's standard library does not have
- `protocol` the conversation between server and launcher
- `cli`      the Claude CLI as a program that sessions can run and not read
- `view`     what a session sees of the file system
- `made_files` files in it that are made, not shown: users, hosts, what would tell of the machine
- `sandbox`  one process of a session: namespaces, limits, privileges, exec
- `folders`  sessions' folders and users
- `groups`   sessions' control groups
- `disk`     what they put on the disk, where no quota bounds it
- `service`  the loop that serves the requests
- `client`   the server's side; the only module that the server imports, and the only one with asyncio

Everything but `client` uses the standard library, `kit.linux.cgroups` and `kit.linux.session_view` alone. The launcher
trusts nothing that it is sent beyond what the server may do to its own sessions: it never follows a path that a session
or the server could have changed, and never runs anything as root.
"""
