"""The launcher: the root process of an agent. It starts the agent server unprivileged and runs processes of sessions.

It is the only part of an agent with privileges, so it is kept small. Run it with `python -m
hypercore_agents.agent.launcher --help`. The server sends it requests over one inherited Unix socket. Read `service`
first; the modules, from the bottom up:

- `kernel`, `seccomp`, `loop_devices`: system calls that Python's standard library lacks
- `protocol`: the messages between server and launcher
- `claude_cli`: the Claude CLI as a program that sessions can execute but not read
- `view`, `generated_files`: what a session sees of the file system, and the files in it that are generated
- `sandbox`: one process of a session: namespaces, limits, privileges, exec
- `storage`: the contract for sessions' files; `disk_images`, `quotas`, `disk_scan`: three ways to limit them;
  `reservations`: the disk space that images reserve; `selection`: which of the three works here
- `folders`: folders and users of sessions
- `groups`, `reached_limits`: control groups of sessions, and which limit ended a process
- `workspace_files`: reading, writing and listing files of a workspace, as the session
- `workers`, `removals`, `disk_enforcement`: work that blocks, in child processes
- `session_processes`: the running processes of sessions
- `service`: the loop that serves the requests
- `client`: the server's side; the only module that the server imports, and the only one with asyncio

All modules but `client` import only the standard library and parts of `kit.linux`. The launcher trusts a request no
further than the server's rights over its own sessions: it never follows a path that a session or the server could have
changed, and never runs anything as root.
"""
