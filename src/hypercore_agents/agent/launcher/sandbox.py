"""Starts one process of a session, from the launcher's fork to the exec, under the init of a new pid namespace.

    launcher ─fork─▶ intermediate: control group, namespaces ─fork─▶ init (pid 1): view, network, limits, user
                                                                     └─fork─▶ the command

The intermediate process exits at once, and the launcher adopts init (it is a subreaper). Init reaps all processes in
its namespace and exits with the command's status, or when the launcher dies. With init, the whole pid namespace ends:
the kernel has killed and collected every process in it before the launcher sees init end.

The `report` socket carries the progress to the launcher: {"init": pid} (as the launcher sees it), {"ready": true} with
the listening socket, {"error": text}. It closes with the exec.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from contextlib import suppress

from hypercore_agents.agent.launcher import generated_files, kernel, seccomp, view
from hypercore_agents.agent.launcher.protocol import CLI, FOLDER, MODEL_ADDRESS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from hypercore_agents.agent.launcher.claude_cli import SessionCli

_MB = 1 << 20
_OPEN_FILES = 8192
_BACKLOG = 128
_NAMESPACES = (
    kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNS
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWUTS
    | kernel.CLONE_NEWCGROUP
)


class ProcessPlan:
    """The process to start: the `request`, the session's `folder` and `uid`, and three descriptors (`stdio`).

    `oom_score` is the `oom_score_adj` of the session's processes.
    `work` is called instead of executing a program, with the workspace and `argv`.
    `reads_all`: the command may read every file in its view, regardless of its mode. Only for a fixed command.
    """

    def __init__(
        self,
        request: dict[str, Any],
        folder: str,
        uid: int,
        stdio: list[int],
        *,
        groups: tuple[str, ...],
        exposed: tuple[str, ...],
        cli: SessionCli,
        memory_mb: int,
        processes: int,
        largest_file_mb: int,
        scratch_mb: int,
        oom_score: int,
        reads_all: bool = False,
        work: Callable[[str, list[str]], int] | None = None,
    ) -> None:
        self.argv = [str(part) for part in request["argv"]]
        self.cli = cli.shown
        if self.cli is not None and self.argv and self.argv[0] in cli.names:
            self.argv[0] = CLI
        self.environment = {str(name): str(value) for name, value in request["environment"].items()}
        self.cwd = os.path.normpath(os.path.join(FOLDER, str(request.get("cwd", "workspace"))))
        self.files = {str(name): str(text) for name, text in request.get("files", {}).items()}
        self.network = bool(request.get("network", False))
        if not self.argv or len(stdio) != 3 or not all(_is_plain(name) for name in self.files):
            raise ValueError("run requires argv, three descriptors and files with plain names")
        self.folder, self.uid, self.stdio = folder, uid, stdio
        self.groups, self.exposed, self.memory_mb = groups, (*exposed, *cli.exposed), memory_mb
        self.processes, self.largest_file_mb, self.scratch_mb = processes, largest_file_mb, scratch_mb
        self.oom_score, self.reads_all, self.work = oom_score, reads_all, work


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def start(plan: ProcessPlan, report: socket.socket) -> int:
    """Fork; return the pid of the intermediate process. In the child this does not return."""
    pid = os.fork()
    if pid:
        return pid
    _guarded(report, lambda: _intermediate(plan, report))


def _guarded(report: socket.socket, work: Callable[[], None]) -> NoReturn:
    try:
        work()
        os._exit(0)
    except BaseException as error:
        try:
            report.send(json.dumps({"error": f"{type(error).__name__}: {error}"[:2000]}).encode())
        finally:
            os._exit(127)


def _intermediate(plan: ProcessPlan, report: socket.socket) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    # Descriptors 0 to 2 stay open, so that no other descriptor gets their numbers.
    kernel.close_all_but({0, 1, 2, report.fileno(), *plan.stdio})
    for group in plan.groups:
        with open(f"{group}/cgroup.procs", "w") as file:
            file.write("0")
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(plan.oom_score))
    os.setsid()
    kernel.unshare(_NAMESPACES)
    init = os.fork()
    if init == 0:
        _guarded(report, lambda: _init(plan, report))
    report.send(json.dumps({"init": init}).encode())


def _init(plan: ProcessPlan, report: socket.socket) -> None:
    kernel.hide_memory()
    kernel.set_command_line("init")
    os.umask(0o022)
    view.enter_session(
        plan.folder,
        plan.exposed,
        uid=plan.uid,
        scratch_mb=plan.scratch_mb,
        memory_mb=plan.memory_mb,
        cli=plan.cli,
    )
    socket.sethostname(generated_files.NAME)
    kernel.bring_loopback_up()
    listening: list[int] = []
    if plan.network:
        # Bound by root before any process of the session runs, so that none can take the address.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        listener.bind(MODEL_ADDRESS)
        listener.listen(_BACKLOG)
        listening = [listener.detach()]
    _limit(plan)
    os.umask(0o077)
    kernel.become_user(plan.uid, reads_all=plan.reads_all)
    kernel.hide_memory()
    seccomp.install()
    for name, text in plan.files.items():
        _write(f"{FOLDER}/{name}", text.encode())
    socket.send_fds(report, [json.dumps({"ready": True}).encode()], listening)
    for descriptor in listening:
        os.close(descriptor)
    _die_with_launcher(report)
    command = os.fork()
    if command == 0:
        _guarded(report, lambda: _exec(plan, report))
    report.close()
    kernel.close_all_but(set())
    os._exit(_reap_until(command))


def _die_with_launcher(report: socket.socket) -> None:
    """Wait until the launcher, now this process's parent, sends "go"; from then on die with it."""
    if report.recv(2) != b"go":
        os._exit(0)
    kernel.die_with_parent(signal.SIGKILL)
    # The launcher may have died just before.
    with suppress(BlockingIOError):
        if report.recv(1, socket.MSG_DONTWAIT) == b"":
            os._exit(0)


def _exec(plan: ProcessPlan, report: socket.socket) -> None:
    for target, descriptor in enumerate(plan.stdio):
        os.dup2(descriptor, target, inheritable=True)
    if plan.work is not None:
        report.close()  # as exec does
        kernel.close_all_but({0, 1, 2})
        os._exit(plan.work(plan.cwd, plan.argv))
    if plan.reads_all:
        _enter_without_links(plan.cwd)
    else:
        os.chdir(plan.cwd)
    os.setsid()
    os.execvpe(plan.argv[0], plan.argv, plan.environment)  # noqa: S606 (the session's command, not as root)


def _enter_without_links(path: str) -> None:
    """Change the working directory without following links, which a tool may have created. Raises OSError."""
    folder = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in path.strip("/").split("/"):
        below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        os.close(folder)
        folder = below
    os.fchdir(folder)


def _reap_until(command: int) -> int:
    """Reap the processes of this namespace until the command ends; return its exit status as a shell does."""
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            return 127
        if pid == command:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _limit(plan: ProcessPlan) -> None:
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, plan.processes),  # counted per user; each session has its own
        (resource.RLIMIT_FSIZE, plan.largest_file_mb * _MB),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_MSGQUEUE, _MB),
    ):
        hard = resource.getrlimit(limit)[1]
        wanted = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (wanted, wanted))


def _write(path: str, content: bytes) -> None:
    """Replace a file, as the session's user; a link or a pipe in its place is removed first."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def probe() -> str | None:
    """Return why sessions cannot be isolated on this host, None if they can. Blocks for some milliseconds."""
    if os.geteuid() != 0:
        return "the launcher is not root"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        _guarded(theirs, lambda: _probe_namespaces(theirs))
    theirs.close()
    with ours:
        ours.settimeout(10)
        try:
            report = ours.recv(4096)
        except TimeoutError:
            report = b'{"error": "the probe did not finish within 10 s"}'
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    result: dict[str, Any] = json.loads(report) if report else {"error": "the probe ended without a result"}
    return None if result.get("ready") else str(result.get("error"))


def _probe_namespaces(report: socket.socket) -> None:
    kernel.unshare(_NAMESPACES)
    if os.fork() == 0:
        _guarded(report, lambda: _probe_in_namespaces(report))
    os.wait()


def _probe_in_namespaces(report: socket.socket) -> None:
    os.umask(0o022)
    view.enter_session("/usr", interpreter_folders(), uid=1 << 30, scratch_mb=1, memory_mb=1)
    kernel.bring_loopback_up()
    kernel.become_user(1 << 30)
    seccomp.install()
    # The unprivileged server must be able to find and read its interpreter.
    command = [sys.executable, "-I", "-S", "-c", "import os, json"]
    child = os.fork()
    if child == 0:
        os.execv(sys.executable, command)  # noqa: S606 (this interpreter)
    if os.waitpid(child, 0)[1] != 0:
        raise OSError(f"other users cannot run {sys.executable}")
    report.send(b'{"ready": true}')


def interpreter_folders() -> tuple[str, ...]:
    """Return the folders of this Python and of its packages."""
    folders = [sys.prefix, sys.base_prefix, *(path for path in sys.path if os.path.isabs(path))]
    return tuple(path for path in folders if os.path.isdir(path))
