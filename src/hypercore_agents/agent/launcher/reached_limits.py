"""Names the limit that refused or ended a session's process, by the counters of control groups.

A session's group is within its user's, which is within that of all sessions; each has a limit. What the kernel tells:

- version 1, and version 2 before Linux 6.11: `pids.events` counts in the group of the process that could not fork,
  whichever limit it was. Version 2 from 6.11 on: in the group whose limit it was and in all above, and
  `pids.events.local` in that group alone.
- version 1: `memory.oom_control` counts a killed process in its own group. Version 2: so does `memory.events`, and
  `memory.events.local` (5.2) counts an `oom` in the group whose limit it was.

Where no counter names the limit, the fullest group does: by its peak (version 1, `memory.peak` of 5.19, `pids.peak` of
6.11), or by what it holds now.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hypercore_agents.kit.linux import cgroups

_MEMORY_USED = ("memory.max_usage_in_bytes", "memory.peak")
_PROCESSES_USED = ("pids.peak",)


@dataclass(frozen=True)
class Level:
    """One of the groups that a session's process is in. `limit` is in bytes, or in processes; `text` names it."""

    group: Path
    limit: int
    text: str


@dataclass(frozen=True)
class Counted:
    """What the kernel had counted of a session at one time: processes that it killed for memory and that it refused to
    start; and, from the session's level outwards, how often each level's own limit of memory or processes was
    reached (None: the kernel does not count that). `group` is the name of the session's group."""

    group: str
    kills: int = 0
    refused: int = 0
    memory: tuple[int | None, ...] = ()
    processes: tuple[int | None, ...] = ()


def count(group: str, memory: Sequence[Path], processes: Sequence[Path]) -> Counted:
    """Read the counters of a session's groups of memory and of processes, from its own outwards."""
    kills = refused = 0
    if memory:
        kills = cgroups.number_in(memory[0], "memory.oom_control", "memory.events", key="oom_kill") or 0
    if processes:
        refused = cgroups.number_in(processes[0], "pids.events", key="max") or 0
    return Counted(
        group,
        kills,
        refused,
        tuple(cgroups.number_in(level, "memory.events.local", key="oom") for level in memory),
        tuple(cgroups.number_in(level, "pids.events.local", key="max") for level in processes),
    )


def memory_limit(levels: Sequence[Level], since: Counted, now: Counted, outside: str) -> str | None:
    """Return the text of the limit for which a process was killed between two counts, None: none was.

    `outside` is the text for memory that was used up beyond all of the levels.
    """
    if now.kills <= since.kills:
        return None
    if risen := _risen(levels, since.memory, now.memory):
        return risen[0].text
    full, known = _full(levels, _MEMORY_USED, slack=1 << 20)
    return full.text if full is not None else outside if known else levels[-1].text


def processes_limit(levels: Sequence[Level], since: Counted, now: Counted) -> str | None:
    """Return the text of the limit for which a process was refused between two counts, None: none was."""
    risen = _risen(levels, since.processes, now.processes)
    by_level = bool(now.processes) and now.processes[0] is not None
    if not risen and (by_level or now.refused <= since.refused):
        return None
    if len(risen) == 1 and risen[0] is not levels[0]:
        return risen[0].text
    # The session's own counter alone may be of any level (version 1, or mounted with `pids_localevents`).
    full, _ = _full(levels, _PROCESSES_USED, slack=0)
    return (full or _fullest(levels, "pids.current")).text


def _risen(levels: Sequence[Level], since: tuple[int | None, ...], now: tuple[int | None, ...]) -> list[Level]:
    """Return the levels whose own limit was reached between two counts."""
    before = since or (0,) * len(now)
    return [level for level, old, new in zip(levels, before, now, strict=False) if (new or 0) > (old or 0)]


def _full(levels: Sequence[Level], files: Sequence[str], *, slack: int) -> tuple[Level | None, bool]:
    """Return the innermost level that reached its limit, and whether all peaks are known."""
    peaks = [cgroups.number_in(level.group, *files) for level in levels]
    for level, peak in zip(levels, peaks, strict=True):
        if peak is not None and peak >= level.limit - slack:
            return level, True
    return None, all(peak is not None for peak in peaks)


def _fullest(levels: Sequence[Level], file: str) -> Level:
    return max(levels, key=lambda level: (cgroups.number_in(level.group, file) or 0) / max(1, level.limit))
