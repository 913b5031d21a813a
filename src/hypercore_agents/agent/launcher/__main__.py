"""Entry point of the launcher; see `--help`. Whoever starts an agent as root starts this, and it starts the server."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys

from hypercore_agents.agent.launcher import kernel, sandbox, selection, view
from hypercore_agents.agent.launcher.claude_cli import STORE, session_cli
from hypercore_agents.agent.launcher.folders import Folders
from hypercore_agents.agent.launcher.groups import SessionGroups, lower_own_score
from hypercore_agents.agent.launcher.protocol import DISK_VARIABLE, FD_VARIABLE, SERVER_FOLDER
from hypercore_agents.agent.launcher.service import Limits, Service
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
"""Where an image has its skills."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Be the launcher of one agent; returns when its server has ended and nothing of its sessions runs."""
    asked = _parser().parse_args(arguments)
    if asked.probe:
        why_not = sandbox.probe()
        disk = selection.probe(asked.state) if why_not is None else None
        print(json.dumps({"separates": why_not is None, "reason": why_not, "disk": disk}))  # noqa: T201
        return 0
    if asked.uid is None or asked.session_uids is None or asked.state is None or not asked.server:
        _parser().error("--uid, --session-uids, --state and the server's command are needed")
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
    os.makedirs(asked.state, mode=0o711, exist_ok=True)
    os.chown(asked.state, 0, 0)
    os.chmod(asked.state, 0o711)  # noqa: S103 (the server passes through to its own folder)
    own = os.path.join(asked.state, "server")
    os.makedirs(own, mode=0o700, exist_ok=True)
    os.chown(own, asked.uid, asked.uid)
    limits = Limits(
        memory_mb=asked.session_memory_mb,
        processes=asked.session_processes,
        cores=asked.session_cores,
        disk_mb=asked.session_disk_mb,
        files=asked.session_files,
        scratch_mb=asked.session_scratch_mb,
    )
    groups = SessionGroups(
        cgroups.Limits(limits.cores, limits.memory_mb, limits.processes) if asked.control_groups else None,
        memory_mb=asked.memory_mb,
        processes=asked.processes,
        score=lower_own_score(),
    )
    kernel.own_mounts()
    methods = selection.METHODS if asked.storage == "auto" else (asked.storage,)
    storage = selection.choose(methods, asked.state, limits.disk_mb, limits.files, asked.siblings)
    os.environ[DISK_VARIABLE] = describe(storage.method, storage.why)
    cli = session_cli(os.environ, (asked.cli_store, os.path.join(asked.state, "cli")))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = os.fork()
    if server == 0:
        try:
            ours.close()
            _become_server(asked.uid, own, theirs, asked.server)
        except BaseException as error:
            os.write(2, f"the agent server did not start: {error}\n".encode())
        finally:
            os._exit(127)
    theirs.close()
    for descriptor in _of_the_server():
        os.close(descriptor)
    exposed = (*asked.expose, *_folder_of_skills())
    service = Service(ours, Folders(asked.state, asked.session_uids, storage), groups, limits, exposed, cli)
    status = service.run(server, wakeup)
    return status if status >= 0 else 128 - status


def _become_server(uid: int, state: str, channel: socket.socket, command: Sequence[str]) -> NoReturn:
    launcher = os.getppid()
    signal.set_wakeup_fd(-1)
    for number in (*_HANDLED, *_IGNORED):
        signal.signal(number, signal.SIG_DFL)
    kernel.unshare(kernel.CLONE_NEWNS)
    os.umask(0o022)
    reads = (*sandbox.of_the_interpreter(), *_folder_of_skills())
    view.enter_server(state, reads, uid=uid, scratch_mb=_SERVER_SCRATCH_MB, at=SERVER_FOLDER)
    os.umask(0o077)
    kernel.become(uid)
    kernel.die_with_parent(signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(0)
    kernel.close_all_but({0, 1, 2, channel.fileno(), *_of_the_server()})
    os.set_inheritable(channel.fileno(), True)
    own = {"AGENT_STATE_DIR": SERVER_FOLDER, "HOME": SERVER_FOLDER, "TMPDIR": "/tmp"}  # noqa: S108 (its own)
    environment = {**os.environ, **own, FD_VARIABLE: str(channel.fileno())}
    os.execvpe(command[0], list(command), environment)  # noqa: S606 (the operator's own command)


def _of_the_server() -> set[int]:
    """Return what was handed down for the server alone: its listening socket, its secret's pipe, a guest's channel."""
    given = (os.environ.get(name, "") for name in ("AGENT_LISTEN_FD", "ENROLMENT_FD", "GUEST_CHANNEL_FD"))
    return {int(descriptor) for descriptor in given if descriptor.isdigit() and int(descriptor) > 2}


def _folder_of_skills() -> list[str]:
    """Return where the operator's skills are, if anywhere: they are read, never written, like all that is exposed."""
    chosen = os.environ.get("SKILLS_DIR", _SKILLS)
    return [os.path.realpath(chosen)] if os.path.isdir(chosen) else []


def _uids(text: str) -> range:
    first, _, last = text.partition("-")
    found = range(int(first), int(last) + 1)
    if len(found) < 1 or found.start < 1:
        raise argparse.ArgumentTypeError("FIRST-LAST, two numbers above zero")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m hypercore_agents.agent.launcher",
        usage="%(prog)s --uid N --session-uids FIRST-LAST --state DIR [options] -- COMMAND...",
        description="Start the agent server (COMMAND) as user N without any rights, and its sessions each under a user "
        "and in namespaces of their own. Needs root. Environment and descriptors are handed on to COMMAND.",
    )
    add = parser.add_argument
    add("--uid", type=int, help="user of the server, nobody else's")
    add(
        "--session-uids",
        type=_uids,
        help="users of sessions, nobody else's here; more than there are sessions",
    )
    add("--state", help="folder of this agent; everything above it must be root's alone")
    add("--expose", action="append", default=[], metavar="PATH", help="let sessions read this too (may be repeated)")
    add("--memory-mb", type=int, help="memory of the agent; default: its control group's limit, or the machine's")
    add("--processes", type=int, help="processes and threads of the agent; default: as for memory")
    add("--session-memory-mb", type=int, default=1024)
    add("--session-processes", type=int, default=512, help="processes and threads of one session")
    add("--session-cores", type=float, default=2.0)
    add("--session-disk-mb", type=int, default=1024, help="all files of a session")
    add("--session-files", type=int, default=100_000, help="files and folders of a session on disk")
    add("--session-scratch-mb", type=int, default=128, help="size of /tmp and of /dev/shm, which are memory")
    add("--cli-store", default=STORE, metavar="DIR", help="where copies of the Claude CLI that sessions run are kept")
    add(
        "--storage",
        choices=("auto", *selection.METHODS),
        default="auto",
        help="how sessions' files are limited; auto: the first that works here",
    )
    add("--siblings", metavar="DIR", help="folder of the agents with which the host's disk is shared")
    add("--no-control-groups", dest="control_groups", action="store_false", help="limit by rlimits alone")
    add("--probe", action="store_true", help="say, as JSON, whether sessions can be kept apart here, and end")
    add("server", nargs="*", metavar="COMMAND")
    return parser


if __name__ == "__main__":
    sys.exit(main())
