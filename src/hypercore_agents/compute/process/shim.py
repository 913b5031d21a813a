"""The process above every agent: it starts the agent, stores its output and exit status, and ends its descendants.

The shim is a separate program (`python -I -S shim.py AGENT_ID PACKAGE_FOLDER`), with the standard library and
`host.shims` only. One runs beside every agent, so it must be small, and no file that the agent can write may be among
its imports.

Invariants:
- It outlives the manager: it has its own session, gets no signals from the manager's terminal and holds no descriptor
  of the manager.
- The agent does not outlive it: the kernel kills the agent when the shim dies (PR_SET_PDEATHSIG, prctl(2)).
- Nothing outlives the agent: the shim reaps all its descendants (PR_SET_CHILD_SUBREAPER), so even a process that called
  setsid twice becomes a child of the shim and is killed. The shim writes "clean" into the exit file only when it has no
  children left.
- The agent executes no instruction before the backend has recorded its process: it waits for `go`, and exits if the
  backend dies first.
- A full disk loses log lines, never the agent or its exit status.

Protocol with the backend, over a SOCK_SEQPACKET socket (one message per read):
    backend: the plan · shim: {"agent": pid} · backend: "go" · shim: {"started": true}; or at any point {"error": ...}

Signals: SIGTERM is passed on to the agent; SIGUSR1 kills the agent and everything below it at once.

Rejected: one shim for all agents (its death would end all of them); a thread of the manager (dies with it); `setpriv`
and `tini` (two more programs to install, and neither records how the agent ended).
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[2])

from hypercore_agents.compute.host.shims import (
    BoundedLog,
    ExitFile,
    close_above,
    memory_kills,
    write_where_possible,
)

# Importing `typing` would cost every shim half a megabyte; type checkers take this name for true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn, TypedDict

    class Plan(TypedDict):
        """What to start. `uid` None: the shim's user; `processes` None: no limit on the processes of that user."""

        command: list[str]
        environment: dict[str, str]
        directory: str
        uid: int | None
        processes: int | None
        cgroups: list[str]
        exit: str
        log: str
        log_bytes: int


LISTEN, ENROLMENT, CONTROL = 3, 4, 5
"""Descriptors from the backend: the agent's socket, the pipe with its secret, the shim's control socket."""

PLAN_BYTES = 128 * 1024
"""Largest plan, in bytes: the size of one message of a local socket under the kernel's default limits."""

_PR_SET_PDEATHSIG, _PR_CAPBSET_READ, _PR_CAPBSET_DROP = 1, 23, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_CHUNK = 64 * 1024
_OPEN_FILES = 64 * 1024
"""Maximum of open files of an agent, if the host allows it: enough for the sockets and pipes of over 100 sessions."""

_HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ)


def _prctl(option: int, value: int = 0) -> int:
    result: int = ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")
    return result


def become_agent(plan: Plan, shim: int, output: int, go: int) -> NoReturn:
    """Turn this forked child into the agent. Raises the error of the step that fails."""
    signal.set_wakeup_fd(-1)
    for number in (*_HANDLED, *_IGNORED):
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    if os.read(go, 1) == b"":
        os._exit(0)
    for group in plan["cgroups"]:
        with open(os.path.join(group, "cgroup.procs"), "w") as file:
            file.write("0")
    # When the host runs out of memory, the kernel should kill an agent before the manager.
    write_where_possible("/proc/self/oom_score_adj", "500")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, possible), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if plan["processes"] is not None:
        resource.setrlimit(resource.RLIMIT_NPROC, (plan["processes"], plan["processes"]))
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    close_above(CONTROL)
    if plan["uid"] is not None:
        drop_privileges(plan["uid"])
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    # Set after the change of user, which clears it. The shim may have died before it was set, so check the parent.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != shim:
        os._exit(0)
    os.umask(0o077)
    os.chdir(plan["directory"])
    os.execve(plan["command"][0], plan["command"], plan["environment"])  # noqa: S606 (the operator's own command)


def drop_privileges(uid: int) -> None:
    """Switch to a user without groups and capabilities, and without a way to regain any."""
    capability = 0
    while True:
        try:
            held = _prctl(_PR_CAPBSET_READ, capability)
        except OSError:
            break
        if held:
            _prctl(_PR_CAPBSET_DROP, capability)
        capability += 1
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def children() -> list[int]:
    """Return the pids of this process's children, including adopted ones and zombies."""
    own = os.getpid()
    try:
        with open(f"/proc/{own}/task/{own}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        pass
    found = []
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{int(name)}/stat", errors="replace") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == own:
                    found.append(int(name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def stop_forks(groups: list[str]) -> None:
    """Forbid processes of the groups to fork, so that killing them terminates."""
    for group in groups:
        write_where_possible(os.path.join(group, "pids.max"), "0")


class Shim:
    """The shim, from the start of the agent until the agent has ended."""

    def __init__(self, plan: Plan, agent: int, output: int, wakeup: int, log: BoundedLog, exit_file: ExitFile) -> None:
        self._groups = plan["cgroups"]
        self._agent = agent
        self._output = output
        self._wakeup = wakeup
        self._log = log
        self._exit_file = exit_file
        self._status: int | None = None
        os.set_blocking(output, False)

    def run(self) -> None:
        """Run until the agent has ended, then end its remaining descendants."""
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        try:
            while self._status is None:
                for descriptor, _ in poll.poll():
                    if descriptor == self._output:
                        # The agent may close its output and continue to run.
                        if self._copy() == b"":
                            poll.unregister(self._output)
                    else:
                        self._handle_signals(os.read(self._wakeup, 256))
        finally:
            self._end_everything()

    def _handle_signals(self, numbers: bytes) -> None:
        if signal.SIGUSR1 in numbers:
            stop_forks(self._groups)
            self._kill(signal.SIGKILL)
        elif signal.SIGTERM in numbers:
            self._kill(signal.SIGTERM)
        self._reap()

    def _kill(self, number: signal.Signals) -> None:
        # Only this process reaps the agent, so the pid cannot have been reused before.
        if self._status is None:
            os.kill(self._agent, number)

    def _reap(self, options: int = os.WNOHANG) -> bool:
        """Reap children that have ended, with `options` 0 at least one; return whether any are left."""
        try:
            while True:
                pid, status = os.waitpid(-1, options)
                if pid == 0:
                    return True
                if pid == self._agent:
                    self._status = os.waitstatus_to_exitcode(status)
                    self._exit_file.write(status=self._status, memory_kills=memory_kills(self._groups), clean=False)
                options = os.WNOHANG
        except ChildProcessError:
            return False

    def _end_everything(self) -> None:
        stop_forks(self._groups)
        # Each round kills the children. Their children then become children of the shim, for the next round.
        while True:
            for pid in children():
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError:
                    continue
            if not self._reap(0):
                break
        while self._copy():
            pass
        if self._status is not None:
            self._exit_file.write(status=self._status, memory_kills=memory_kills(self._groups), clean=True)

    def _copy(self) -> bytes | None:
        """Move a chunk of output to the log and return it: b"" at the end, None if there is none now."""
        try:
            data = os.read(self._output, _CHUNK)
        except BlockingIOError:
            return None
        self._log.write(data)
        return data


def send(message: dict[str, Any]) -> None:
    """Send a message to the backend; do nothing if the backend is gone."""
    try:
        os.write(CONTROL, json.dumps(message).encode())
    except OSError:
        return


def start(plan: Plan) -> Shim | None:
    """Start the agent by the plan; return None if the backend is gone or got an error."""
    wakeup, wakeup_end = os.pipe()
    os.set_blocking(wakeup_end, False)
    signal.set_wakeup_fd(wakeup_end)
    for number in _HANDLED:
        signal.signal(number, lambda *_: None)
    log = BoundedLog(plan["log"], plan["log_bytes"])
    exit_file = ExitFile(plan["exit"])
    output, output_end = os.pipe()
    go, go_end = os.pipe()
    failure, failure_end = os.pipe()
    shim = os.getpid()
    agent = os.fork()
    if agent == 0:
        try:
            os.close(go_end)
            # Replaces the control socket, which the agent must not have. It closes at the exec, which reports success.
            os.dup2(failure_end, CONTROL, inheritable=False)
            become_agent(plan, shim, output_end, go)
        except BaseException as error:
            os.write(CONTROL, str(error).encode(errors="replace")[:4096])
        finally:
            os._exit(127)
    for descriptor in (LISTEN, ENROLMENT, output_end, go, failure_end):
        os.close(descriptor)
    send({"agent": agent})
    go_received = os.read(CONTROL, PLAN_BYTES) == b"go" and os.write(go_end, b"g") == 1
    os.close(go_end)
    failed = os.read(failure, 4096)
    os.close(failure)
    if failed or not go_received:
        os.waitpid(agent, 0)
        send({"error": failed.decode(errors="replace")})
        return None
    send({"started": True})
    os.close(CONTROL)
    return Shim(plan, agent, output, wakeup, log, exit_file)


def main() -> int:
    """Run the shim of one agent."""
    os.chdir("/")
    close_above(CONTROL)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    try:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        shim = start(json.loads(os.read(CONTROL, PLAN_BYTES)))
    except Exception as error:
        send({"error": f"{type(error).__name__}: {error}"})
        return 1
    if shim is None:
        return 1
    shim.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
