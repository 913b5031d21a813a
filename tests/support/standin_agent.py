"""A tiny agent for tests of backends: it reads what a backend passes to an agent, and executes the test's orders.

It uses the standard library only and is one file, so it can be copied to a folder that another user can read. It
answers one line of JSON per connection: {"do": ..., ...} → {"result": ...}. With `deaf` it ignores SIGTERM; with `slow`
it exits after a delay, with status 7.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

SECRET = b""
HELD: list[bytearray] = []


def daemon(seconds: float) -> int:
    """Start a process in another session and process group, reparented from this process, and return its pid."""
    reading, writing = os.pipe()
    first = os.fork()
    if first == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            os.write(writing, str(os.getpid()).encode())
            os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", f"import time; time.sleep({seconds})"])
        os._exit(0)
    os.waitpid(first, 0)
    return int(os.read(reading, 32))


def forks(wanted: int) -> int:
    """Start processes until `wanted` or until the kernel refuses; return their number."""
    for count in range(wanted):
        try:
            if os.fork() == 0:
                while True:
                    signal.pause()
        except OSError:
            return count
    return wanted


def eat(megabytes: int) -> None:
    for _ in range(megabytes):
        HELD.append(bytearray(os.urandom(4096)) * 256)


def eat_in_child(megabytes: int) -> int:
    child = os.fork()
    if child == 0:
        eat(megabytes)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def deep(levels: int) -> None:
    home = os.getcwd()
    for _ in range(levels):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(home)


def status() -> dict[str, str]:
    with open("/proc/self/status") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)


def linger(*_: object) -> None:
    time.sleep(0.3)
    os._exit(7)


def do(order: dict[str, Any]) -> object:
    match order["do"]:
        case "look":
            return {
                "pid": os.getpid(),
                "secret": SECRET.decode(),
                "environment": dict(os.environ),
                "argv": sys.orig_argv,
                "directory": os.getcwd(),
                "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd")),
                "status": status(),
                "groups": open("/proc/self/cgroup").read(),
            }
        case "print":
            sys.stdout.buffer.write((order["text"] * order.get("times", 1)).encode())
            sys.stdout.flush()
        case "close output":
            os.close(1)
            os.close(2)
        case "exit":
            return None  # exits after the answer is sent
        case "daemon":
            return daemon(order.get("seconds", 600))
        case "forks":
            return forks(order["wanted"])
        case "bomb":
            subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", "import os\nwhile True:\n try: os.fork()\n except OSError: pass"]
            )
        case "eat":
            eat(order["megabytes"])
        case "eat in child":
            return eat_in_child(order["megabytes"])
        case "deep":
            deep(order["levels"])
        case "write":
            with open(order["path"], "w") as file:
                file.write(order["text"])
        case "read":
            with open(order["path"]) as file:
                return file.read()
        case "kill":
            os.kill(order["pid"], order["signal"])
    return None


def serve() -> None:
    with socket.socket(fileno=int(os.environ["AGENT_LISTEN_FD"])) as listener:
        listener.set_inheritable(False)
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rwb") as stream:
                order: dict[str, Any] = {}
                try:
                    order = json.loads(stream.readline())
                    answer = {"result": do(order)}
                except Exception as error:
                    answer = {"error": f"{type(error).__name__}: {error}"}
                with contextlib.suppress(OSError):
                    stream.write(json.dumps(answer).encode() + b"\n")
                    stream.flush()
                    connection.shutdown(socket.SHUT_WR)
            if order.get("do") == "exit":
                os._exit(order["status"])


if __name__ == "__main__":
    if "deaf" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "slow" in sys.argv:
        signal.signal(signal.SIGTERM, linger)
    with open(int(os.environ["ENROLMENT_FD"]), "rb") as pipe:
        SECRET = pipe.read()
    serve()
