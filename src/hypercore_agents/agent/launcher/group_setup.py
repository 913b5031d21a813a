"""Setting up the launcher's control groups, and moving processes between the groups of sessions."""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

from hypercore_agents.kit.linux import cgroups

_MB = 1 << 20
RESERVED_MB = 384
"""Memory reserved for launcher and server, or a quarter if that is less."""
RESERVED_PROCESSES = 256
"""Processes and threads reserved for launcher and server, or an eighth if that is less."""
_MOST_MOVES = 20


def limits_of_all_sessions(
    agent_group: cgroups.Cgroups, memory_mb: int | None, processes: int | None
) -> tuple[int, int]:
    """Return the memory (MB) and the processes that all sessions may use together.

    `memory_mb` and `processes` are the agent's limits; None: those of its group, or of the machine.
    """
    machine_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _MB
    memory, pids = (agent_group.bases.get(controller) for controller in ("memory", "pids"))
    if memory_mb is None:
        limit = memory and cgroups.number_in(memory, "memory.limit_in_bytes", "memory.max")
        memory_mb = min(machine_mb, limit // _MB) if limit else machine_mb
    if processes is None:
        limits = [pids and cgroups.number_in(pids, "pids.max")]
        limits += [cgroups.number_in(Path("/proc/sys/kernel"), name) for name in ("pid_max", "threads-max")]
        processes = min([limit for limit in limits if limit] or [4096])
    return (
        memory_mb - min(RESERVED_MB, memory_mb // 4),
        processes - min(RESERVED_PROCESSES, processes // 8),
    )


def move_processes(old: tuple[str, ...], new: tuple[str, ...]) -> None:
    """Move all processes, also those that start meanwhile, from one session's groups to another's. Raises OSError."""
    for source, target in zip(old, new, strict=True):
        for _ in range(_MOST_MOVES):
            pids = cgroups.members([source])
            if not pids:
                break
            for pid in pids:
                with suppress(ProcessLookupError), open(f"{target}/cgroup.procs", "w") as procs:
                    procs.write(str(pid))
            time.sleep(0)
        else:
            raise OSError(errno.EBUSY, f"processes start faster in {source} than they can be moved")


def move_launcher_to_subgroup() -> None:
    """Move the launcher out of its version 2 group, if limits are set there, so that groups can be made below it."""
    with open("/proc/self/cgroup") as file:
        own = [line.strip().split(":", 2)[2] for line in file if line.startswith("0::")]
    with open("/proc/self/mountinfo") as file:
        mounts = [line.split(" ")[4] for line in file if " - cgroup2 " in line]
    if not own or not mounts:
        return
    group = mounts[0] + (own[0] if own[0] != "/" else "")
    with open(f"{group}/cgroup.controllers") as file:
        if "memory" not in file.read().split():
            return
    subgroup = f"{group}/launcher"
    os.makedirs(subgroup, exist_ok=True)
    with open(f"{subgroup}/cgroup.procs", "w") as procs:
        procs.write("0")
