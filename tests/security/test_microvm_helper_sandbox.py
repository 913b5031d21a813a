"""Rights of a shim and of a template holder on the host. Each attempt succeeds without the sandbox, as a control."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hypercore_agents
from hypercore_agents.compute.host.identity import ProcessIdentity
from hypercore_agents.compute.microvm import helper_sandbox, syscalls
from support.microvm_backend import MicrovmSubject

pytestmark = pytest.mark.root

UID = 1_899_999_999
ATTEMPTS = """
import ctypes, json, os, signal, socket, sys
sys.path.insert(0, sys.argv[1])
from hypercore_agents.compute.microvm import helper_sandbox, syscalls
place, uid, victim, prey = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
libc = ctypes.CDLL(None, use_errno=True)
held = os.open("/", os.O_PATH | os.O_DIRECTORY)

def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)

def connected_pair():
    one, other = socket.socketpair()
    one.close(), other.close()

def read(path, **more):
    os.close(os.open(path, os.O_RDONLY, **more))

def forked():
    if os.fork() == 0:
        os._exit(0)
    os.wait()

ATTEMPTS = {
    "read /etc/shadow": lambda: read("/etc/shadow"),
    "read a file below a folder that is open": lambda: read("etc/shadow", dir_fd=held),
    "list /": lambda: os.listdir("/") or (_ for _ in ()).throw(OSError("empty")),
    "fork": forked,
    "make a unix socket": lambda: socket.socket(socket.AF_UNIX).close(),
    "make a packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
    "be root": lambda: os.setresuid(0, 0, 0),
    "have a namespace": lambda: call("unshare", syscalls.CLONE_NEWUTS),
    "trace": lambda: (call("ptrace", 16, victim, 0, 0), os.waitpid(victim, 0), call("ptrace", 17, victim, 0, 0)),
    "stop another process": lambda: os.kill(victim, signal.SIGCONT),
}

def outcomes():
    found = {}
    for name, attempt in ATTEMPTS.items():
        try:
            attempt()
            found[name] = "done"
        except (OSError, ValueError) as error:
            found[name] = "refused"
    return found

before = outcomes()
helper_sandbox.enter(place, uid, syscalls.CAP_KILL)
helper_sandbox.filter_system_calls(may_kill=prey)
after = outcomes()
os.kill(prey, signal.SIGKILL)
with socket.socket() as sock:
    sock.setblocking(False)
print(json.dumps([before, after]), flush=True)
"""


def test_a_helper_sandbox_allows_no_access_and_one_kill(tmp_path: Path) -> None:
    package = str(Path(hypercore_agents.__file__).parent.parent)
    with subprocess.Popen(["sleep", "100"]) as victim, subprocess.Popen(["sleep", "100"]) as prey:
        command = [sys.executable, "-I", "-S", "-c", ATTEMPTS, package, str(tmp_path), str(UID), str(victim.pid)]
        done = subprocess.run([*command, str(prey.pid)], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        before, after = json.loads(done.stdout)
        assert prey.wait(10) == -9
        assert victim.poll() is None
        victim.kill()
    assert [name for name, outcome in before.items() if outcome != "done"] == []
    assert [name for name, outcome in after.items() if outcome != "refused"] == []


def rights(pid: int) -> dict[str, str]:
    """Return the rights that /proc shows for a process; all of its threads must have the same."""
    found: set[tuple[tuple[str, str], ...]] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        status = {name: value.strip() for name, value in lines}
        found.add(tuple((name, status[name]) for name in ("Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "CapBnd")))
    assert len(found) == 1, found
    return dict(next(iter(found)))


async def test_shims_and_holders_have_separate_users_an_empty_root_and_a_filter(subject: MicrovmSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    record = subject.record(sandbox)
    assert record.uid is not None
    assert record.shim is not None
    (description,) = (subject.place.state / "microvm/templates").glob("*/template.json")
    holder = ProcessIdentity.from_json(json.loads(description.read_text())["holder"])
    assert holder is not None
    shim_uid = record.uid + helper_sandbox.UID_OFFSET
    for pid, uid in ((record.shim.pid, shim_uid), (holder.pid, helper_sandbox.HOLDER_UID)):
        found = rights(pid)
        assert set(found["Uid"].split() + found["Gid"].split()) == {str(uid)}
        assert (found["Groups"], found["NoNewPrivs"], found["Seccomp"]) == ("", "1", "2")
        assert int(found["CapBnd"], 16) == 0
        assert list(Path(f"/proc/{pid}/root").iterdir()) == []
        assert os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
    effective = {
        line.split()[1]
        for task in Path(f"/proc/{record.shim.pid}/task").iterdir()
        for line in (task / "status").read_text().splitlines()
        if line.startswith("CapEff")
    }
    assert {int(value, 16) for value in effective} == {0, 1 << syscalls.CAP_KILL}
