"""Finds the limit that refused or ended a session's process, from the counters of control groups.

A session's group is in its user's group, which is in the group of all sessions; each has a limit. The kernel counts:

- version 1, and version 2 before Linux 6.11: `pids.events` in the group of the process that could not fork, whichever
  limit was reached. Version 2 from 6.11: in the group whose limit was reached and in all above it, and
  `pids.events.local` in that group only.
- version 1: `memory.oom_control` counts a killed process in its own group. Version 2: so does `memory.events`, and
  `memory.events.local` (5.2) counts an `oom` in the group whose limit was reached.

If no counter identifies the limit, the fullest group does: by its peak (version 1, `memory.peak` from 5.19, `pids.peak`
from 6.11), or by its current use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hypercore_agents.kit.linux import cgroups

_MEMORY_PEAKS = ("memory.max_usage_in_bytes", "memory.peak")
_PROCESS_PEAKS = ("pids.peak",)


@dataclass(frozen=True)
class Level:
    """A group that contains a session's processes. `limit` is in bytes, or in processes; `text` describes it."""

    group: Path
    limit: int
    text: str


@dataclass(frozen=True)
class LimitCounters:
    """The kernel's counters of a session at one time. `group` is the name of the session's group.

    `kills` counts processes killed for memory, `refused` forks that failed. `memory` and `processes` count how often
    each level's own limit was reached, from the session's level outwards (None: the kernel does not count it).
    """

    group: str
    kills: int = 0
    refused: int = 0
    memory: tuple[int | None, ...] = ()
    processes: tuple[int | None, ...] = ()


def read_counters(group: str, memory: Sequence[Path], processes: Sequence[Path]) -> LimitCounters:
    """Read the counters of a session's memory groups and process groups, from its own outwards."""
    kills = refused = 0
    if memory:
        kills = cgroups.number_in(memory[0], "memory.oom_control", "memory.events", key="oom_kill") or 0
    if processes:
        refused = cgroups.number_in(processes[0], "pids.events", key="max") or 0
    return LimitCounters(
        group,
        kills,
        refused,
        tuple(cgroups.number_in(level, "memory.events.local", key="oom") for level in memory),
        tuple(cgroups.number_in(level, "pids.events.local", key="max") for level in processes),
    )


def memory_limit(levels: Sequence[Level], since: LimitCounters, now: LimitCounters, outside: str) -> str | None:
    """Return the text of the memory limit that killed a process between two readings, None if none was killed.

    `outside` is the text for memory exhausted outside of all levels.
    """
    if now.kills <= since.kills:
        return None
    if reached := _reached(levels, since.memory, now.memory):
        return reached[0].text
    full, peaks_known = _full(levels, _MEMORY_PEAKS, slack=1 << 20)
    return full.text if full is not None else outside if peaks_known else levels[-1].text


def processes_limit(levels: Sequence[Level], since: LimitCounters, now: LimitCounters) -> str | None:
    """Return the text of the limit that refused a process between two readings, None if none was refused."""
    reached = _reached(levels, since.processes, now.processes)
    counted_by_level = bool(now.processes) and now.processes[0] is not None
    if not reached and (counted_by_level or now.refused <= since.refused):
        return None
    if len(reached) == 1 and reached[0] is not levels[0]:
        return reached[0].text
    # The session's own counter may stand for any level (version 1, or a mount with `pids_localevents`).
    full, _ = _full(levels, _PROCESS_PEAKS, slack=0)
    return (full or _fullest(levels, "pids.current")).text


def _reached(levels: Sequence[Level], since: tuple[int | None, ...], now: tuple[int | None, ...]) -> list[Level]:
    """Return the levels whose own limit was reached between two readings."""
    before = since or (0,) * len(now)
    return [level for level, old, new in zip(levels, before, now, strict=False) if (new or 0) > (old or 0)]


def _full(levels: Sequence[Level], files: Sequence[str], *, slack: int) -> tuple[Level | None, bool]:
    """Return the innermost level whose peak reached its limit, and whether all peaks are known."""
    peaks = [cgroups.number_in(level.group, *files) for level in levels]
    for level, peak in zip(levels, peaks, strict=True):
        if peak is not None and peak >= level.limit - slack:
            return level, True
    return None, all(peak is not None for peak in peaks)


def _fullest(levels: Sequence[Level], file: str) -> Level:
    return max(levels, key=lambda level: (cgroups.number_in(level.group, file) or 0) / max(1, level.limit))
