"""Entry point of the launcher; see `--help`. An agent that is started as root starts here."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys

from hypercore_agents.agent.launcher import kernel, oom_scores, sandbox, selection, view
from hypercore_agents.agent.launcher.claude_cli import STORE, session_cli
from hypercore_agents.agent.launcher.folders import Folders
from hypercore_agents.agent.launcher.groups import SessionGroups
from hypercore_agents.agent.launcher.protocol import DISK_VARIABLE, FD_VARIABLE, SERVER_FOLDER
from hypercore_agents.agent.launcher.service import Service
from hypercore_agents.agent.launcher.session_processes import SessionLimits
from hypercore_agents.agent.launcher.storage import describe
from hypercore_agents.kit.linux import cgroups

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
_IGNORED = (signal.SIGHUP, signal.SIGPIPE)
_SERVER_SCRATCH_MB = 64
_SKILLS = "/opt/hypercore-agents/skills"
"""The folder of skills in a guest image."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the launcher of one agent until its server and all processes of its sessions have ended."""
    options = _parser().parse_args(arguments)
    if options.probe:
        reason = sandbox.probe()
        disk = selection.probe(options.state) if reason is None else None
        print(json.dumps({"separates": reason is None, "reason": reason, "disk": disk}))  # noqa: T201
        return 0
    if options.uid is None or options.session_uids is None or options.state is None or not options.server:
        _parser().error("--uid, --session-uids, --state and the server's command are required")
    os.chdir("/")
    os.umask(0o077)
    kernel.hide_memory()
    kernel.adopt_orphans()
    wakeup, wakeup_end = os.pipe()
    os.set_blocking(wakeup_end, False)
    signal.set_wakeup_fd(wakeup_end, warn_on_full_buffer=False)
    for number in _HANDLED:
        signal.signal(number, lambda *_: None)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.makedirs(options.state, mode=0o711, exist_ok=True)
    os.chown(options.state, 0, 0)
    os.chmod(options.state, 0o711)  # noqa: S103 (the server must reach its folder below)
    server_folder = os.path.join(options.state, "server")
    os.makedirs(server_folder, mode=0o700, exist_ok=True)
    os.chown(server_folder, options.uid, options.uid)
    limits = SessionLimits(
        memory_mb=options.session_memory_mb,
        processes=options.session_processes,
        cores=options.session_cores,
        disk_mb=options.session_disk_mb,
        files=options.session_files,
        scratch_mb=options.session_scratch_mb,
    )
    groups = SessionGroups(
        cgroups.Limits(limits.cores, limits.memory_mb, limits.processes) if options.control_groups else None,
        memory_mb=options.memory_mb,
        processes=options.processes,
        oom_score=oom_scores.lower_own(),
    )
    kernel.enter_mount_namespace()
    methods = selection.METHODS if options.storage == "auto" else (options.storage,)
    storage = selection.choose(methods, options.state, limits.disk_mb, limits.files, options.siblings)
    os.environ[DISK_VARIABLE] = describe(storage.method, storage.reason)
    cli = session_cli(os.environ, (options.cli_store, os.path.join(options.state, "cli")))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = os.fork()
    if server == 0:
        try:
            ours.close()
            _become_server(options.uid, server_folder, theirs, options.server)
        except BaseException as error:
            os.write(2, f"cannot start the agent server: {error}\n".encode())
        finally:
            os._exit(127)
    theirs.close()
    for descriptor in _server_descriptors():
        os.close(descriptor)
    exposed = (*options.expose, *_skills_folders())
    service = Service(ours, Folders(options.state, options.session_uids, storage), groups, limits, exposed, cli)
    status = service.run(server, wakeup)
    return status if status >= 0 else 128 - status


def _become_server(uid: int, state: str, channel: socket.socket, command: Sequence[str]) -> NoReturn:
    launcher = os.getppid()
    signal.set_wakeup_fd(-1)
    for number in (*_HANDLED, *_IGNORED):
        signal.signal(number, signal.SIG_DFL)
    kernel.unshare(kernel.CLONE_NEWNS)
    os.umask(0o022)
    readable = (*sandbox.interpreter_folders(), *_skills_folders())
    view.enter_server(state, readable, uid=uid, scratch_mb=_SERVER_SCRATCH_MB, at=SERVER_FOLDER)
    os.umask(0o077)
    kernel.become_user(uid)
    kernel.die_with_parent(signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(0)
    kernel.close_all_but({0, 1, 2, channel.fileno(), *_server_descriptors()})
    os.set_inheritable(channel.fileno(), True)
    own = {"AGENT_STATE_DIR": SERVER_FOLDER, "HOME": SERVER_FOLDER, "TMPDIR": "/tmp"}  # noqa: S108 (private to its view)
    environment = {**os.environ, **own, FD_VARIABLE: str(channel.fileno())}
    os.execvpe(command[0], list(command), environment)  # noqa: S606 (the operator's command)


def _server_descriptors() -> set[int]:
    """Return the inherited descriptors of the server: its listening socket, its secret's pipe, a guest's channel."""
    values = (os.environ.get(name, "") for name in ("AGENT_LISTEN_FD", "ENROLMENT_FD", "GUEST_CHANNEL_FD"))
    return {int(descriptor) for descriptor in values if descriptor.isdigit() and int(descriptor) > 2}


def _skills_folders() -> list[str]:
    """Return the folder of the operator's skills, if it exists; it is exposed read-only."""
    folder = os.environ.get("SKILLS_DIR", _SKILLS)
    return [os.path.realpath(folder)] if os.path.isdir(folder) else []


def _uids(text: str) -> range:
    first, _, last = text.partition("-")
    uids = range(int(first), int(last) + 1)
    if len(uids) < 1 or uids.start < 1:
        raise argparse.ArgumentTypeError("must be FIRST-LAST, two numbers above zero")
    return uids


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m hypercore_agents.agent.launcher",
        usage="%(prog)s --uid N --session-uids FIRST-LAST --state DIR [options] -- COMMAND...",
        description="Start the agent server (COMMAND) as the unprivileged user N, and run each of its sessions as a "
        "separate user in separate namespaces. Requires root. COMMAND inherits environment and descriptors.",
    )
    add = parser.add_argument
    add("--uid", type=int, help="uid of the server; nothing else may use it")
    add(
        "--session-uids",
        type=_uids,
        help="uids of sessions; nothing else may use them, and there must be more than sessions",
    )
    add("--state", help="folder of this agent; only root may be able to change the folders above it")
    add(
        "--expose",
        action="append",
        default=[],
        metavar="PATH",
        help="show this path to sessions, read-only (repeatable)",
    )
    add("--memory-mb", type=int, help="memory of the agent; default: the limit of its control group, or of the machine")
    add("--processes", type=int, help="processes and threads of the agent; default: as for --memory-mb")
    add("--session-memory-mb", type=int, default=1024, help="memory of one session")
    add("--session-processes", type=int, default=512, help="processes and threads of one session")
    add("--session-cores", type=float, default=2.0, help="CPU cores of one session")
    add("--session-disk-mb", type=int, default=1024, help="disk space of one session")
    add("--session-files", type=int, default=100_000, help="files and folders of one session on disk")
    add("--session-scratch-mb", type=int, default=128, help="size of /tmp and of /dev/shm, which are in memory")
    add("--cli-store", default=STORE, metavar="DIR", help="folder of the copies of the Claude CLI that sessions run")
    add(
        "--storage",
        choices=("auto", *selection.METHODS),
        default="auto",
        help="how to limit sessions' files; auto: the first method that works here",
    )
    add("--siblings", metavar="DIR", help="folder of all agents that share the host's disk")
    add("--no-control-groups", dest="control_groups", action="store_false", help="use rlimits only")
    add("--probe", action="store_true", help="print, as JSON, whether sessions can be isolated on this host, and exit")
    add("server", nargs="*", metavar="COMMAND")
    return parser


if __name__ == "__main__":
    sys.exit(main())
