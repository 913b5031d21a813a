"""Files that a view shows instead of the host's: its user in `/etc`, and replacements of files that reveal the host.

`etc` returns files below `/etc`: they give `whoami`, `ssh` and `git commit` a user with a name, a home and an email
address. `proc` returns replacements of the files of `/proc` that hold the host's kernel command line, load and memory
use; `HIDDEN_FOLDERS` and `HIDDEN_FILES` are shown empty. sysinfo(2) and each process's `mountinfo` cannot be hidden in
this way.
"""

from __future__ import annotations

import os

NAME = "session"
"""Name of a session's user, group and host."""

HIDDEN_FOLDERS = ("acpi", "asound", "bus", "driver", "fs", "irq", "pressure", "scsi", "tty")
HIDDEN_FILES = (
    "buddyinfo", "cgroups", "config.gz", "diskstats", "interrupts", "key-users", "keys", "locks", "mdstat", "modules",
    "partitions", "schedstat", "softirqs", "vmstat", "zoneinfo",
)  # fmt: skip
"""Files of `/proc` that other users than root may read."""


def etc(uid: int, home: str, *, name: str = NAME) -> dict[str, str]:
    """Return file contents by path below `/etc`, for a view whose user is `uid`."""
    shell = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
    return {
        "passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\n"
        f"{name}:x:{uid}:{uid}:{name}:{home}:{shell}\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
        "group": f"root:x:0:\n{name}:x:{uid}:\nnogroup:x:65534:\n",
        "hostname": f"{name}\n",
        "hosts": f"127.0.0.1 localhost {name}\n::1 localhost\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nnetworks: files\n"
        "protocols: files\nservices: files\nethers: files\nrpc: files\n",
        # without a domain git cannot derive an address; a user's own configuration takes precedence
        "gitconfig": f"[user]\n\tname = {name}\n\temail = {name}@localhost\n",
    }


def proc(memory_mb: int) -> dict[str, str]:
    """Return file contents by path below `/proc`, for a session with this memory limit."""
    total = f"{memory_mb * 1024:>12} kB\n"
    nothing = f"{0:>12} kB\n"
    files = {"cmdline": "\n", "loadavg": "0.00 0.00 0.00 1/1 1\n", "stat": _stat(), **dict.fromkeys(HIDDEN_FILES, "")}
    files["swaps"] = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    files["meminfo"] = "".join(
        f"{name + ':':<15}{total if name in ('MemTotal', 'MemFree', 'MemAvailable') else nothing}"
        for name in ("MemTotal", "MemFree", "MemAvailable", "Buffers", "Cached", "Shmem", "SwapTotal", "SwapFree")
    )
    return files


def _stat() -> str:
    """Return `/proc/stat` with the processors and the boot time, which `ps` needs, but without their usage."""
    lines = []
    with open("/proc/stat") as file:
        for line in file:
            name = line.split(" ", 1)[0]
            if name.startswith("cpu"):
                lines.append(f"{name}{'  ' if name == 'cpu' else ' '}0 0 0 0 0 0 0 0 0 0\n")
            elif name == "btime":
                lines.append(line)
    return "".join([*lines, "intr 0\nctxt 0\nprocesses 0\nprocs_running 1\nprocs_blocked 0\n"])
