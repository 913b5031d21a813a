"""Control groups of sessions: what one session, one user's sessions together, and all sessions together may use.

    the agent's group: launcher, server
    └── sessions            the agent's limit without what is reserved for launcher and server
        ├── unassigned      prewarmed processes that wait for a user
        └── user            a user's share of it, over all of their sessions here
            └── session     the limits of one session

So launcher and server are outside of everything that a session fills, and when a limit is reached the kernel kills
inside the group that reached it. Where the limits of several users together are reached first, it kills a process of
the user who holds most, if that is more than an equal part: `watch` raises the `oom_score_adj` of their processes.

The kernel does not move memory that is charged already with the process that holds it. A prewarmed process therefore
leaves its memory in `sessions`, and the limits of the session and of the user who takes it are lowered by as much.

Under version 2 a group with groups below may hold no processes itself, so the launcher first moves itself (and so the
server, which it starts later) into one of its own beside the sessions'. Where no groups can be made, rlimits are all
there is.
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from contextlib import suppress
from pathlib import Path

from hypercore_agents.agent.launcher.reached_limits import Counted, Level, count, memory_limit, processes_limit
from hypercore_agents.kit.linux import cgroups

_PATIENCE = 0.2
_MB = 1 << 20
_MEMORY, _PROCESSES = "--session-memory-mb of the agent's launcher", "--session-processes of the agent's launcher"
"""Where the limits of a session are set."""
RESERVED_MB = 384
"""Memory that launcher and server keep for themselves, or a quarter where that is less."""
RESERVED_PROCESSES = 256
"""Processes and threads that launcher and server keep for themselves, or an eighth where that is less."""
LEAST_SHARE_MB = 384
"""A user's share is never less memory than one Claude CLI needs, however small the agent."""
_NEARLY_MOST = 0.9
"""Part of what the user who holds most holds: who holds less than that is not killed in that user's place."""
_CROWDED = 0.5
"""Part of the sessions' memory in use from which on `watch` looks at who holds how much."""
_MOST_MOVES = 20
_UNUSED_SECONDS = 10.0
_RAISED = 1000
_UNLIMITED = 1 << 62
_OUTSIDE = "the memory of this agent or of its host was used up, within the limits of its sessions"


class LimitReached(Exception):
    """A limit is reached. `kind` is "memory", "processes" or "disk"; the message says which one, for the user."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _User:
    """The group of one user's sessions. `held` is memory outside of it that counts against it, by session."""

    def __init__(self, name: str, below: cgroups.Cgroups, memory_mb: int, processes: int, adjusted: int) -> None:
        self.name, self.below = name, below
        self.memory_mb, self.processes = memory_mb, processes
        self.held: dict[str, int] = {}
        self.sessions: set[str] = set()
        self.adjusted = adjusted
        self.unused_since = time.monotonic()

    def memory_left(self) -> int:
        """Return the limit in MB that is left for what is charged to the group itself."""
        return self.memory_mb - sum(self.held.values())


class _Session:
    """The group of one session. `first` is what was counted when it was made, `told` when somebody was told last."""

    def __init__(self, name: str, user: str, memory_mb: int) -> None:
        self.name, self.user, self.memory_mb = name, user, memory_mb
        self.first = self.told = Counted(name)


class SessionGroups:
    """Makes the groups. `limits` are one session's, None: no groups. `memory_mb` and `processes` are all that the agent
    may use; None: what its own group or the machine allows. `score` is the `oom_score_adj` of sessions' processes."""

    def __init__(
        self,
        limits: cgroups.Limits | None,
        *,
        memory_mb: int | None = None,
        processes: int | None = None,
        score: int = 300,
    ) -> None:
        self._limits = limits
        self._top: cgroups.Cgroups | None = None
        self._below: cgroups.Cgroups | None = None
        self._scope = f"hypercore-{os.getpid()}-sessions"
        self._memory_mb = self._processes = 0
        self._users: dict[str, _User] = {}
        self._sessions: dict[str, _Session] = {}
        self._numbers = itertools.count(1)
        self.score = score
        if limits is not None:
            with suppress(OSError):
                _step_aside()
                self._top = cgroups.detect()
        if self._top is not None:
            self._memory_mb, self._processes = _for_sessions(self._top, memory_mb, processes)
            try:
                # A killed launcher that had the same pid may have left its groups, empty.
                cgroups.remove(self._top.paths(self._scope), patience=0)
                self._top.create(self._scope, cgroups.Limits(None, self._memory_mb, self._processes))
                self._below = self._top.below(self._scope)
            except OSError:
                self._top = None

    @property
    def enforced(self) -> frozenset[str]:
        """Which of "cores", "memory", "pids" are limited per session."""
        return self._top.enforced if self._top else frozenset()

    def of(self, session: str, uid: int, user: str = "", share: float = 1.0) -> tuple[str, ...]:
        """Return the group's directories of a session, made if they are not there. Raises OSError.

        `user` is any name of the session's user, "" while it has none; `share` is the part of all sessions' memory and
        processes that this user's sessions may use together.
        """
        if self._below is None:
            return ()
        if session not in self._sessions:
            self._make(session, uid, self._user(user, share), user, held_mb=0)
        place = self._sessions[session]
        return self._users[place.user].below.paths(place.name)

    def assign(self, session: str, uid: int, user: str, share: float) -> None:
        """Count a session that had no user as this user's from now on. Raises LimitReached, and OSError."""
        place = self._sessions.get(session)
        if self._below is None or place is None or place.user == user:
            return
        before = self._users[place.user]
        old = before.below.paths(place.name)
        owner = self._user(user, share)
        held = self._held_mb(before.below, place.name)
        try:
            self._check_room(owner, old, held)
        except LimitReached:
            self._note_if_unused(user)
            raise
        try:
            self._make(session, uid, owner, user, held_mb=held)
            new = owner.below.paths(self._sessions[session].name)
            try:
                _move(old, new)
            except OSError:
                with suppress(OSError):
                    _move(new, old)
                self.release(session)
                raise
        except OSError:  # it stays what it was, with all that it runs
            self._sessions[session] = place
            raise
        before.sessions.discard(session)
        with suppress(OSError):
            cgroups.remove(old, patience=_PATIENCE)
        self._note_if_unused(place.user)

    def counted(self, session: str) -> Counted:
        """Return what the kernel has counted of the session by now, for `reached`."""
        place = self._sessions.get(session)
        if place is None:
            return Counted("")
        below = self._users[place.user].below
        memory, pids = (below.bases.get(controller) for controller in ("memory", "pids"))
        levels = [(base / place.name, base, base.parent) if base else () for base in (memory, pids)]
        return count(place.name, *levels)

    def reached(self, session: str, since: Counted | None = None) -> LimitReached | None:
        """Return the limit that the session reached since something was `counted`, None when it reached none.

        Without `since`: since this was last asked without it. So each reader is told, whatever others have read.
        """
        place = self._sessions.get(session)
        if place is None:
            return None
        now = self.counted(session)
        if since is None:
            since, place.told = place.told, now
        elif since.group != place.name:  # the session has a user since, and with it a new group
            since = place.first
        user = self._users[place.user]
        memory, pids = (user.below.bases.get(controller) for controller in ("memory", "pids"))
        if memory is not None:
            text = memory_limit(self._memory_levels(memory, place, user), since, now, _OUTSIDE)
            if text is not None:
                return LimitReached("memory", text)
        if pids is not None:
            text = processes_limit(self._process_levels(pids, place, user), since, now)
            if text is not None:
                return LimitReached("processes", text)
        return None

    def watch(self) -> None:
        """Mark the processes of the users who hold most, and more than an equal part, while memory is more than half in
        use."""
        memory = self._below.bases.get("memory") if self._below else None
        users = [user for key, user in self._users.items() if key]
        if memory is None or len(users) < 2:
            return
        with suppress(OSError):
            if cgroups.memory_in_use(memory) < _CROWDED * self._memory_mb * _MB:
                return
            holds = {user: cgroups.memory_in_use(memory / user.name) + sum(user.held.values()) * _MB for user in users}
            least = max(self._memory_mb // len(users) * _MB, _NEARLY_MOST * max(holds.values()))
            for user, held in holds.items():
                wanted = _RAISED if held > least else self.score
                if wanted == user.adjusted == self.score:
                    continue
                for pid in cgroups.members([str(memory / user.name)]):
                    _write_score(f"/proc/{pid}/oom_score_adj", wanted)
                user.adjusted = wanted

    def release(self, session: str) -> None:
        """Remove the groups of a session that runs nothing; what the kernel still holds goes with the agent's group."""
        place = self._sessions.pop(session, None)
        if place is None:
            return
        user = self._users[place.user]
        with suppress(OSError):
            cgroups.remove(user.below.paths(place.name), patience=_PATIENCE)
        user.sessions.discard(session)
        if user.held.pop(session, 0) and user.sessions:
            with suppress(OSError):
                user_groups = self._below
                assert user_groups is not None
                user_groups.limit_memory(user.name, user.memory_left())
        self._note_if_unused(place.user)

    def close(self) -> None:
        """Remove what is left, at the launcher's end."""
        for session in list(self._sessions):
            self.release(session)
        if self._top is not None:
            with suppress(OSError):
                cgroups.remove(self._top.paths(self._scope), patience=_PATIENCE)

    def _user(self, key: str, share: float) -> _User:
        found = self._users.get(key)
        if found is None:
            assert self._below is not None
            self._drop_unused()
            name = f"user-{next(self._numbers)}" if key else "unassigned"
            share = share if key else 1.0
            memory = min(self._memory_mb, max(LEAST_SHARE_MB, int(self._memory_mb * share)))
            least = self._limits.processes if self._limits and self._limits.processes else 0
            processes = min(self._processes, max(least, int(self._processes * share)))
            self._below.create(name, cgroups.Limits(None, memory, processes))
            found = _User(name, self._below.below(name), memory, processes, self.score)
            self._users[key] = found
        return found

    def _make(self, session: str, uid: int, user: _User, key: str, *, held_mb: int) -> None:
        assert self._limits is not None
        limits = self._limits
        memory = None if limits.memory_mb is None else max(1, limits.memory_mb - held_mb)
        # Numbered: a user may come back while the kernel still holds the group of the one before.
        name = f"session-{uid}.{next(self._numbers)}"
        try:
            user.below.create(name, cgroups.Limits(limits.cores, memory, limits.processes))
        except OSError:
            user.held.pop(session, None)
            self._note_if_unused(key)
            raise
        user.sessions.add(session)
        self._sessions[session] = _Session(name, key, memory or 0)
        if held_mb:
            user.held[session] = held_mb
            with suppress(OSError):  # somebody's memory grew since `_check_room`: the next limit above holds
                assert self._below is not None
                self._below.limit_memory(user.name, user.memory_left())
        # What the user's group counted before this session is not this session's.
        place = self._sessions[session]
        place.first = place.told = self.counted(session)

    def _held_mb(self, below: cgroups.Cgroups, name: str) -> int:
        memory = below.bases.get("memory")
        return 0 if memory is None else -(-cgroups.memory_in_use(memory / name) // _MB)

    def _check_room(self, user: _User, moving: tuple[str, ...], held_mb: int) -> None:
        assert self._below is not None
        memory, pids = (self._below.bases.get(controller) for controller in ("memory", "pids"))
        if memory is not None:
            used = cgroups.memory_in_use(memory / user.name) // _MB
            if used + held_mb > user.memory_left():
                raise LimitReached("memory", self._share_of_memory(user))
        if pids is not None:
            used = cgroups.number_in(pids / user.name, "pids.current") or 0
            if used + len(cgroups.members(moving)) > user.processes:
                raise LimitReached("processes", self._share_of_processes(user))

    def _memory_levels(self, memory: Path, place: _Session, user: _User) -> tuple[Level, ...]:
        whole = self._limits.memory_mb if self._limits else None
        own = f"the session's memory limit of {whole} MB was reached ({_MEMORY})"
        of_all = f"the memory of all users' sessions on this agent, {self._memory_mb} MB, was used up"
        return (
            Level(memory / place.name, place.memory_mb * _MB or _UNLIMITED, own),
            Level(memory, user.memory_left() * _MB, self._share_of_memory(user)),
            Level(memory.parent, self._memory_mb * _MB, of_all),
        )

    def _process_levels(self, pids: Path, place: _Session, user: _User) -> tuple[Level, ...]:
        most = self._limits.processes if self._limits else None
        own = f"the session's limit of {most} processes and threads was reached ({_PROCESSES})"
        of_all = f"all users' sessions on this agent have its {self._processes} processes and threads"
        return (
            Level(pids / place.name, most or _UNLIMITED, own),
            Level(pids, user.processes, self._share_of_processes(user)),
            Level(pids.parent, self._processes, of_all),
        )

    def _share_of_memory(self, user: _User) -> str:
        return f"this user's sessions used up their share of the agent's memory, {user.memory_mb} MB (USER_SHARE)"

    def _share_of_processes(self, user: _User) -> str:
        share = f"share of the agent's processes and threads, {user.processes}"
        return f"this user's sessions used up their {share} (USER_SHARE)"

    def _note_if_unused(self, key: str) -> None:
        """Note that a user's group holds no session; it stays for a moment, since the next one may come soon."""
        user = self._users.get(key)
        if user is not None and not user.sessions:
            user.unused_since = time.monotonic()

    def _drop_unused(self) -> None:
        assert self._below is not None
        now = time.monotonic()
        for key, user in list(self._users.items()):
            if not user.sessions and now - user.unused_since > _UNUSED_SECONDS:
                del self._users[key]
                with suppress(OSError):
                    cgroups.remove(self._below.paths(user.name), patience=_PATIENCE)


def _for_sessions(top: cgroups.Cgroups, memory_mb: int | None, processes: int | None) -> tuple[int, int]:
    """Return the memory (MB) and the processes that all sessions may use together."""
    machine_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _MB
    memory, pids = (top.bases.get(controller) for controller in ("memory", "pids"))
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


def _move(old: tuple[str, ...], new: tuple[str, ...]) -> None:
    """Move all processes from one session's groups to another's; what they start meanwhile as well. Raises OSError."""
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


def lower_own_score() -> int:
    """Make launcher and server the last of the agent that the kernel kills for memory; return what sessions get."""
    own = "/proc/self/oom_score_adj"
    with suppress(OSError, ValueError), open(own) as file:
        current = int(file.read())
        _write_score(own, max(-900, current - 400))
        return min(_RAISED - 200, current + 300)
    return 300


def _write_score(path: str, score: int) -> None:
    with suppress(OSError), open(path, "w") as file:
        file.write(str(score))


def _step_aside() -> None:
    """Leave our version 2 group to the groups below it, if that is where limits are set."""
    with open("/proc/self/cgroup") as file:
        own = [line.strip().split(":", 2)[2] for line in file if line.startswith("0::")]
    with open("/proc/self/mountinfo") as file:
        points = [line.split(" ")[4] for line in file if " - cgroup2 " in line]
    if not own or not points:
        return
    here = points[0] + (own[0] if own[0] != "/" else "")
    with open(f"{here}/cgroup.controllers") as file:
        if "memory" not in file.read().split():
            return
    aside = f"{here}/launcher"
    os.makedirs(aside, exist_ok=True)
    with open(f"{aside}/cgroup.procs", "w") as procs:
        procs.write("0")
