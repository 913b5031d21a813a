"""Control groups of sessions: the limits of one session, of one user's sessions, and of all sessions together.

    the agent's group: launcher, server
    └── sessions            the agent's limit without the part reserved for launcher and server
        ├── unassigned      prewarmed processes that have no user yet
        └── user            the user's share of it, for all of their sessions on this agent
            └── session     the limits of one session

Sessions cannot exhaust the memory of launcher and server, which are outside of `sessions`. When a limit is reached, the
kernel kills a process inside the group that reached it. When several users together reach the limit of `sessions`, it
kills a process of the user with the largest use, if that use exceeds an equal share: `adjust_oom_scores` raises the
`oom_score_adj` of that user's processes.

The kernel does not move charged memory along with a process. The memory of a prewarmed process stays charged to
`sessions`, so the limits of its new session and of that session's user are lowered by that amount.

Under version 2 a group with child groups may hold no processes, so the launcher first moves itself, and the server that
it starts later, into a group beside `sessions`. Where no groups can be made, only rlimits apply.
"""

from __future__ import annotations

import itertools
import os
import time
from contextlib import suppress
from pathlib import Path

from hypercore_agents.agent.launcher import oom_scores
from hypercore_agents.agent.launcher.group_setup import (
    limits_of_all_sessions,
    move_launcher_to_subgroup,
    move_processes,
)
from hypercore_agents.agent.launcher.reached_limits import (
    Level,
    LimitCounters,
    memory_limit,
    processes_limit,
    read_counters,
)
from hypercore_agents.kit.linux import cgroups

_REMOVAL_SECONDS = 0.2
_MB = 1 << 20
_MEMORY, _PROCESSES = "--session-memory-mb of the agent's launcher", "--session-processes of the agent's launcher"
"""The options that set a session's limits."""
LEAST_SHARE_MB = 384
"""A user's share is never less memory than one Claude CLI needs, even on a small agent."""
_NEARLY_MOST = 0.9
"""A user is killed for memory only if they hold more than this part of what the largest user holds."""
_CROWDED = 0.5
"""Part of the sessions' memory in use above which `adjust_oom_scores` compares users."""
_UNUSED_SECONDS = 10.0
_UNLIMITED = 1 << 62
_OUTSIDE = "the memory of this agent or of its host was used up, within the limits of its sessions"


class LimitReached(Exception):
    """A limit is reached. `kind` is "memory", "processes" or "disk"; the message names the limit, for the user."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _UserGroup:
    """The group of one user's sessions. `charged_elsewhere` is memory outside of it that counts against it, in MB by
    session."""

    def __init__(self, name: str, sessions: cgroups.Cgroups, memory_mb: int, processes: int, oom_score: int) -> None:
        self.name, self.session_groups = name, sessions
        self.memory_mb, self.processes = memory_mb, processes
        self.charged_elsewhere: dict[str, int] = {}
        self.sessions: set[str] = set()
        self.oom_score = oom_score
        self.unused_since = time.monotonic()

    def memory_left(self) -> int:
        """Return the limit in MB for the memory that is charged to the group itself."""
        return self.memory_mb - sum(self.charged_elsewhere.values())


class _SessionGroup:
    """The group of one session. `at_creation` are its counters when it was made, `last_reported` those of the last
    report."""

    def __init__(self, name: str, user: str, memory_mb: int) -> None:
        self.name, self.user, self.memory_mb = name, user, memory_mb
        self.at_creation = self.last_reported = LimitCounters(name)


class SessionGroups:
    """Makes and removes the control groups. `limits` are those of one session; None: no groups.

    `memory_mb` and `processes` are the agent's limits; None: those of its own group, or of the machine. `oom_score` is
    the `oom_score_adj` of sessions' processes.
    """

    def __init__(
        self,
        limits: cgroups.Limits | None,
        *,
        memory_mb: int | None = None,
        processes: int | None = None,
        oom_score: int = 300,
    ) -> None:
        self._limits = limits
        self._agent_group: cgroups.Cgroups | None = None
        self._user_groups: cgroups.Cgroups | None = None
        self._scope = f"hypercore-{os.getpid()}-sessions"
        self._memory_mb = self._processes = 0
        self._users: dict[str, _UserGroup] = {}
        self._sessions: dict[str, _SessionGroup] = {}
        self._numbers = itertools.count(1)
        self.oom_score = oom_score
        if limits is not None:
            with suppress(OSError):
                move_launcher_to_subgroup()
                self._agent_group = cgroups.detect()
        if self._agent_group is not None:
            self._memory_mb, self._processes = limits_of_all_sessions(self._agent_group, memory_mb, processes)
            try:
                # A killed launcher that had the same pid may have left its groups, empty.
                cgroups.remove(self._agent_group.paths(self._scope), patience=0)
                self._agent_group.create(self._scope, cgroups.Limits(None, self._memory_mb, self._processes))
                self._user_groups = self._agent_group.below(self._scope)
            except OSError:
                self._agent_group = None

    @property
    def enforced(self) -> frozenset[str]:
        """Which of "cores", "memory", "pids" are limited per session."""
        return self._agent_group.enforced if self._agent_group else frozenset()

    def ensure(self, session: str, uid: int, user: str = "", share: float = 1.0) -> tuple[str, ...]:
        """Return the directories of a session's group, created if they do not exist. Raises OSError.

        `user` is any name of the session's user, "" while it has none; `share` is the part of all sessions' memory and
        processes that this user's sessions may use together.
        """
        if self._user_groups is None:
            return ()
        if session not in self._sessions:
            self._create(session, uid, self._user(user, share), user, charged_mb=0)
        group = self._sessions[session]
        return self._users[group.user].session_groups.paths(group.name)

    def assign(self, session: str, uid: int, user: str, share: float) -> None:
        """Move a session without a user into this user's group. Raises LimitReached, and OSError."""
        group = self._sessions.get(session)
        if self._user_groups is None or group is None or group.user == user:
            return
        previous = self._users[group.user]
        old = previous.session_groups.paths(group.name)
        owner = self._user(user, share)
        charged = self._charged_mb(previous.session_groups, group.name)
        try:
            self._check_capacity(owner, old, charged)
        except LimitReached:
            self._mark_if_unused(user)
            raise
        try:
            self._create(session, uid, owner, user, charged_mb=charged)
            new = owner.session_groups.paths(self._sessions[session].name)
            try:
                move_processes(old, new)
            except OSError:
                with suppress(OSError):
                    move_processes(new, old)
                self.release(session)
                raise
        except OSError:  # the session stays in its group, with all of its processes
            self._sessions[session] = group
            raise
        previous.sessions.discard(session)
        with suppress(OSError):
            cgroups.remove(old, patience=_REMOVAL_SECONDS)
        self._mark_if_unused(group.user)

    def counters(self, session: str) -> LimitCounters:
        """Return the session's current counters, for `reached_limit`."""
        group = self._sessions.get(session)
        if group is None:
            return LimitCounters("")
        session_groups = self._users[group.user].session_groups
        memory, pids = (session_groups.bases.get(controller) for controller in ("memory", "pids"))
        levels = [(base / group.name, base, base.parent) if base else () for base in (memory, pids)]
        return read_counters(group.name, *levels)

    def reached_limit(self, session: str, since: LimitCounters | None = None) -> LimitReached | None:
        """Return the limit that the session reached since some `counters`, None if it reached none.

        Without `since`: since the last call without it. So each reader learns of a limit, whatever others have read.
        """
        group = self._sessions.get(session)
        if group is None:
            return None
        now = self.counters(session)
        if since is None:
            since, group.last_reported = group.last_reported, now
        elif since.group != group.name:  # the session was assigned to a user, and got a new group
            since = group.at_creation
        user = self._users[group.user]
        memory, pids = (user.session_groups.bases.get(controller) for controller in ("memory", "pids"))
        if memory is not None:
            text = memory_limit(self._memory_levels(memory, group, user), since, now, _OUTSIDE)
            if text is not None:
                return LimitReached("memory", text)
        if pids is not None:
            text = processes_limit(self._process_levels(pids, group, user), since, now)
            if text is not None:
                return LimitReached("processes", text)
        return None

    def adjust_oom_scores(self) -> None:
        """While more than half of the memory is in use, raise the OOM scores of the users who hold most and more than
        an equal part."""
        memory = self._user_groups.bases.get("memory") if self._user_groups else None
        users = [user for key, user in self._users.items() if key]
        if memory is None or len(users) < 2:
            return
        with suppress(OSError):
            if cgroups.memory_in_use(memory) < _CROWDED * self._memory_mb * _MB:
                return
            held = {
                user: cgroups.memory_in_use(memory / user.name) + sum(user.charged_elsewhere.values()) * _MB
                for user in users
            }
            least = max(self._memory_mb // len(users) * _MB, _NEARLY_MOST * max(held.values()))
            for user, size in held.items():
                wanted = oom_scores.RAISED if size > least else self.oom_score
                if wanted == user.oom_score == self.oom_score:
                    continue
                for pid in cgroups.members([str(memory / user.name)]):
                    oom_scores.write(pid, wanted)
                user.oom_score = wanted

    def release(self, session: str) -> None:
        """Remove the group of a session without processes; what the kernel still uses goes with the agent's group."""
        group = self._sessions.pop(session, None)
        if group is None:
            return
        user = self._users[group.user]
        with suppress(OSError):
            cgroups.remove(user.session_groups.paths(group.name), patience=_REMOVAL_SECONDS)
        user.sessions.discard(session)
        if user.charged_elsewhere.pop(session, 0) and user.sessions:
            with suppress(OSError):
                self._limit_memory(user)
        self._mark_if_unused(group.user)

    def close(self) -> None:
        """Remove all groups, when the launcher ends."""
        for session in list(self._sessions):
            self.release(session)
        if self._agent_group is not None:
            with suppress(OSError):
                cgroups.remove(self._agent_group.paths(self._scope), patience=_REMOVAL_SECONDS)

    def _user(self, key: str, share: float) -> _UserGroup:
        user = self._users.get(key)
        if user is None:
            assert self._user_groups is not None
            self._remove_unused()
            name = f"user-{next(self._numbers)}" if key else "unassigned"
            share = share if key else 1.0
            memory = min(self._memory_mb, max(LEAST_SHARE_MB, int(self._memory_mb * share)))
            least = self._limits.processes if self._limits and self._limits.processes else 0
            processes = min(self._processes, max(least, int(self._processes * share)))
            self._user_groups.create(name, cgroups.Limits(None, memory, processes))
            user = _UserGroup(name, self._user_groups.below(name), memory, processes, self.oom_score)
            self._users[key] = user
        return user

    def _create(self, session: str, uid: int, user: _UserGroup, key: str, *, charged_mb: int) -> None:
        assert self._limits is not None
        limits = self._limits
        memory = None if limits.memory_mb is None else max(1, limits.memory_mb - charged_mb)
        # Numbered: a uid may be reused while the kernel still holds the group of its previous session.
        name = f"session-{uid}.{next(self._numbers)}"
        try:
            user.session_groups.create(name, cgroups.Limits(limits.cores, memory, limits.processes))
        except OSError:
            user.charged_elsewhere.pop(session, None)
            self._mark_if_unused(key)
            raise
        user.sessions.add(session)
        self._sessions[session] = group = _SessionGroup(name, key, memory or 0)
        if charged_mb:
            user.charged_elsewhere[session] = charged_mb
            with suppress(OSError):  # the user's memory grew since `_check_capacity`: the limit of all sessions holds
                self._limit_memory(user)
        # Counts of the user's group from before this session are not this session's.
        group.at_creation = group.last_reported = self.counters(session)

    def _limit_memory(self, user: _UserGroup) -> None:
        assert self._user_groups is not None
        self._user_groups.limit_memory(user.name, user.memory_left())

    def _charged_mb(self, groups: cgroups.Cgroups, name: str) -> int:
        memory = groups.bases.get("memory")
        return 0 if memory is None else -(-cgroups.memory_in_use(memory / name) // _MB)

    def _check_capacity(self, user: _UserGroup, moving: tuple[str, ...], charged_mb: int) -> None:
        assert self._user_groups is not None
        memory, pids = (self._user_groups.bases.get(controller) for controller in ("memory", "pids"))
        if memory is not None:
            used = cgroups.memory_in_use(memory / user.name) // _MB
            if used + charged_mb > user.memory_left():
                raise LimitReached("memory", _memory_share_text(user))
        if pids is not None:
            used = cgroups.number_in(pids / user.name, "pids.current") or 0
            if used + len(cgroups.members(moving)) > user.processes:
                raise LimitReached("processes", _process_share_text(user))

    def _memory_levels(self, memory: Path, group: _SessionGroup, user: _UserGroup) -> tuple[Level, ...]:
        limit = self._limits.memory_mb if self._limits else None
        of_session = f"the session's memory limit of {limit} MB was reached ({_MEMORY})"
        of_all = f"the memory of all users' sessions on this agent, {self._memory_mb} MB, was used up"
        return (
            Level(memory / group.name, group.memory_mb * _MB or _UNLIMITED, of_session),
            Level(memory, user.memory_left() * _MB, _memory_share_text(user)),
            Level(memory.parent, self._memory_mb * _MB, of_all),
        )

    def _process_levels(self, pids: Path, group: _SessionGroup, user: _UserGroup) -> tuple[Level, ...]:
        limit = self._limits.processes if self._limits else None
        of_session = f"the session's limit of {limit} processes and threads was reached ({_PROCESSES})"
        of_all = f"all users' sessions on this agent use its {self._processes} processes and threads"
        return (
            Level(pids / group.name, limit or _UNLIMITED, of_session),
            Level(pids, user.processes, _process_share_text(user)),
            Level(pids.parent, self._processes, of_all),
        )

    def _mark_if_unused(self, key: str) -> None:
        """Record that a user's group holds no session; it is kept for a while, since another one may come soon."""
        user = self._users.get(key)
        if user is not None and not user.sessions:
            user.unused_since = time.monotonic()

    def _remove_unused(self) -> None:
        assert self._user_groups is not None
        now = time.monotonic()
        for key, user in list(self._users.items()):
            if not user.sessions and now - user.unused_since > _UNUSED_SECONDS:
                del self._users[key]
                with suppress(OSError):
                    cgroups.remove(self._user_groups.paths(user.name), patience=_REMOVAL_SECONDS)


def limit_fields(limit: LimitReached | None) -> dict[str, list[str]]:
    """Return the fields of a reply that report a reached limit."""
    return {} if limit is None else {"limit": [limit.kind, str(limit)]}


def _memory_share_text(user: _UserGroup) -> str:
    return f"this user's sessions used up their share of the agent's memory, {user.memory_mb} MB (USER_SHARE)"


def _process_share_text(user: _UserGroup) -> str:
    share = f"share of the agent's processes and threads, {user.processes}"
    return f"this user's sessions used up their {share} (USER_SHARE)"
