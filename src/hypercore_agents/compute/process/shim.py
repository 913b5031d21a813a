"""The process above every agent: it starts the agent, keeps what it prints and how it ended, and ends all of it.

A program of its own, run by its path with the standard library and `host.shims` only (`python -I -S shim.py AGENT_ID
PACKAGE_FOLDER`): there is one beside every agent, so it must be small, and nothing that the agent can write may reach
its imports.

What it keeps true:
- It outlives the manager: its own session, no signal from the manager's terminal, no descriptor of the manager's.
- The agent does not outlive it: the kernel kills the agent when the shim dies (PR_SET_PDEATHSIG, prctl(2)).
- Nothing outlives the agent: the shim is the reaper of all its descendants (PR_SET_CHILD_SUBREAPER), so even one that
  called setsid twice comes back to it as a child and is killed. Only when it has no children left does it say
  "clean" in the exit file.
- The agent runs no instruction before the backend has written who it is: it waits for `go`, and goes away if the
  backend dies first.
- A full disk costs log lines, never the agent nor its exit status.

Conversation with the backend, over a SOCK_SEQPACKET socket (one message per read):
    backend: the plan · shim: {"agent": pid} · backend: "go" · shim: {"started": true}; or at any point {"error": ...}

Signals: SIGTERM asks the agent to end; SIGUSR1 kills everything at once.

Rejected: one shim for all agents (its death would take all of them along); a thread of the manager (dies with it);
`setpriv` and `tini` (two more programs that must be there, and neither writes down how the agent ended).
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
        """What to start. `uid` None: the shim's own user; `processes` None: no limit of that user's processes."""

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
"""Descriptors that the backend hands over: the agent's socket, its secret's pipe, our conversation."""

PLAN_BYTES = 128 * 1024
"""Largest plan, in bytes: what a local socket takes as one message under the kernel's default limits."""

_PR_SET_PDEATHSIG, _PR_CAPBSET_READ, _PR_CAPBSET_DROP = 1, 23, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_CHUNK = 64 * 1024
_OPEN_FILES = 64 * 1024
"""Open files that an agent may have where the host allows so many: sockets and pipes of a hundred sessions and more."""

_HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ)


def _prctl(option: int, value: int = 0) -> int:
    result: int = ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")
    return result


def become_agent(plan: Plan, shim: int, output: int, go: int) -> NoReturn:
    """Turn this forked child into the agent. Raises whatever stands in the way."""
    signal.set_wakeup_fd(-1)
    for number in (*_HANDLED, *_IGNORED):
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    if os.read(go, 1) == b"":
        os._exit(0)
    for group in plan["cgroups"]:
        with open(os.path.join(group, "cgroup.procs"), "w") as file:
            file.write("0")
    # When the whole host runs out of memory, an agent should go before the manager does.
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
    # After the change of user, which clears it; and the shim may have died before it was set.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != shim:
        os._exit(0)
    os.umask(0o077)
    os.chdir(plan["directory"])
    os.execve(plan["command"][0], plan["command"], plan["environment"])  # noqa: S606 (the operator's own command)


def drop_privileges(uid: int) -> None:
    """Become a user that is nobody else: no groups, no capabilities, and no way to get any back."""
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
    """Return the pids of this process's children, adopted ones and zombies included."""
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
    """Let no process of the groups start another, so that killing them comes to an end."""
    for group in groups:
        write_where_possible(os.path.join(group, "pids.max"), "0")


class Shim:
    """The shim's life after the agent has started."""

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
        """Serve until the agent has ended, then end everything that it left behind."""
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        try:
            while self._status is None:
                for descriptor, _ in poll.poll():
                    if descriptor == self._output:
                        # The agent may close its output and live on.
                        if self._copy() == b"":
                            poll.unregister(self._output)
                    else:
                        self._obey(os.read(self._wakeup, 256))
        finally:
            self._end_everything()

    def _obey(self, numbers: bytes) -> None:
        if signal.SIGUSR1 in numbers:
            stop_forks(self._groups)
            self._kill(signal.SIGKILL)
        elif signal.SIGTERM in numbers:
            self._kill(signal.SIGTERM)
        self._reap()

    def _kill(self, number: signal.Signals) -> None:
        # Only this process reaps the agent, so until then the pid is the agent's.
        if self._status is None:
            os.kill(self._agent, number)

    def _reap(self, options: int = os.WNOHANG) -> bool:
        """Collect children that ended, with `options` 0 at least one; say whether any are left."""
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
        # Each round kills the children; theirs become ours and are the next round's.
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
        """Move a chunk of output to the log and return it: b"" at its end, None when there is none now."""
        try:
            data = os.read(self._output, _CHUNK)
        except BlockingIOError:
            return None
        self._log.write(data)
        return data


def say(message: dict[str, Any]) -> None:
    """Tell the backend; it may be gone, and then nobody needs to know."""
    try:
        os.write(CONTROL, json.dumps(message).encode())
    except OSError:
        return


def start(plan: Plan) -> Shim | None:
    """Start the agent as the plan says; return None when the backend went away or was told an error."""
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
            # The place of our conversation, which is not the agent's: it closes with the exec, and that is the news.
            os.dup2(failure_end, CONTROL, inheritable=False)
            become_agent(plan, shim, output_end, go)
        except BaseException as error:
            os.write(CONTROL, str(error).encode(errors="replace")[:4096])
        finally:
            os._exit(127)
    for descriptor in (LISTEN, ENROLMENT, output_end, go, failure_end):
        os.close(descriptor)
    say({"agent": agent})
    went = os.read(CONTROL, PLAN_BYTES) == b"go" and os.write(go_end, b"g") == 1
    os.close(go_end)
    trouble = os.read(failure, 4096)
    os.close(failure)
    if trouble or not went:
        os.waitpid(agent, 0)
        say({"error": trouble.decode(errors="replace")})
        return None
    say({"started": True})
    os.close(CONTROL)
    return Shim(plan, agent, output, wakeup, log, exit_file)


def main() -> int:
    """Be the shim of one agent."""
    os.chdir("/")
    close_above(CONTROL)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    try:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        shim = start(json.loads(os.read(CONTROL, PLAN_BYTES)))
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        return 1
    if shim is None:
        return 1
    shim.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
