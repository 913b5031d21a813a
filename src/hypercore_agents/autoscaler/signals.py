"""Sources of the load signals: Prometheus, or the manager's own statistics.

Each source returns a `Reading`: a trustworthy observation, or a problem. No value is guessed: a required value that is
missing, older than `longest_age`, negative, not finite or larger than possible makes the reading a problem. An optional
signal (CPU, memory, queue, starts, host load, rate limit, spawn time) that is missing or implausible is unknown.

Every query sums over the pool's agents; a result with several series is implausible. The age of a sample is judged by
Prometheus' clock, because an instant query returns the last value for five minutes after a failed scrape. If a running
agent is missing from the sum, the sum is a lower bound and the observation is marked incomplete: the pool can grow but
does not shrink.
"""

import asyncio
import math
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import ValidationError

from hypercore_agents.api.agents import StatsView
from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.api.pool import SignalProblem
from hypercore_agents.autoscaler.json_client import JsonClient
from hypercore_agents.autoscaler.policy import Observation

_MOST_SESSIONS_PER_AGENT = 1000
_MOST_AGENTS = 10_000
_POOL = 'kind="pool"'


@dataclass(frozen=True)
class Reading:
    """An observation, or the problem that prevents it."""

    observation: Observation | None
    problem: SignalProblem | None = None
    detail: str | None = None


class SignalSource(Protocol):
    """A source of signals."""

    async def read(self) -> Reading:
        """Return the current reading. Failures of the source are returned as problems, not raised."""
        ...


def queries(longest_age: float) -> dict[str, str]:
    """Return the PromQL expressions; each yields one number or nothing. `longest_age` is in seconds."""

    def recent(series: str) -> str:
        return f"({series} and (time() - timestamp({series}) < {longest_age:g}))"

    sessions, running = f"agent_active_sessions{{{_POOL}}}", "hypercore_pool_running"
    return {
        "sessions": f"sum({recent(sessions)})",
        "reporting": f"count({recent(sessions)})",
        "age": f"time() - max(timestamp({sessions}))",
        "running": f"max({recent(running)})",  # every manager process reports the same number
        "running_age": f"time() - max(timestamp({running}))",
        "spawn_seconds": "histogram_quantile(0.9, sum by (le) "
        "(rate(hypercore_agent_spawn_duration_seconds_bucket[30m])))",
        "cpu": f"avg(agent_cpu_utilisation{{{_POOL}}})",
        "memory": f"avg(agent_memory_utilisation{{{_POOL}}})",
        "queue_wait_seconds": "histogram_quantile(0.95, sum by (le) "
        f"(rate(agent_queue_wait_seconds_bucket{{{_POOL}}}[1m])))",
        "start_wait_seconds": "histogram_quantile(0.95, sum by (le) "
        f"(rate(agent_start_wait_seconds_bucket{{{_POOL}}}[1m])))",
        "host_load": "max(hypercore_host_load) / (max(hypercore_host_processors) > 0)",
        "api_headroom": "min(hypercore_gateway_rate_limit_headroom)",
    }


_OPTIONAL = {
    "spawn_seconds": 3600.0,
    "cpu": 2.0,
    "memory": 2.0,
    "queue_wait_seconds": 3600.0,
    "start_wait_seconds": 3600.0,
    "host_load": 10_000.0,
    "api_headroom": 1.0,
}
"""Optional signals, each with its largest plausible value."""


class _Untrusted(Exception):
    def __init__(self, problem: SignalProblem, detail: str) -> None:
        super().__init__(detail)
        self.problem = problem
        self.detail = detail


class PrometheusSignals:
    """Signals from PromQL queries to Prometheus' HTTP API (`/api/v1/query`). `longest_age` is in seconds."""

    def __init__(self, client: JsonClient, *, longest_age: float) -> None:
        self._client = client
        self._longest_age = longest_age
        self._queries = queries(longest_age)

    async def read(self) -> Reading:
        """Return the current reading from Prometheus."""
        names = list(self._queries)
        answers = await asyncio.gather(*(self._value(self._queries[name]) for name in names), return_exceptions=True)
        values: dict[str, float | None] = {}
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, float) or answer is None:
                values[name] = answer
            elif name in _OPTIONAL and isinstance(answer, HypercoreError | _Untrusted):
                values[name] = None
            elif isinstance(answer, HypercoreError):
                return Reading(None, SignalProblem.UNREACHABLE, answer.message)
            elif isinstance(answer, _Untrusted):
                return Reading(None, answer.problem, f"{name}: {answer.detail}")
            else:
                raise answer
        try:
            return Reading(self._observation(values))
        except _Untrusted as fault:
            return Reading(None, fault.problem, fault.detail)

    async def _value(self, query: str) -> float | None:
        """Return the single number of the query's result, None for an empty one. Raises _Untrusted, HypercoreError."""
        document = await self._client.request("GET", "/api/v1/query", query={"query": query, "timeout": "5s"})
        try:
            data = document["data"]
            if document["status"] != "success" or data["resultType"] != "vector":
                raise _Untrusted(SignalProblem.ABSURD, "Prometheus did not answer with a vector")
            result = data["result"]
            if len(result) > 1:
                raise _Untrusted(SignalProblem.ABSURD, f"{len(result)} series where one was expected")
            return float(result[0]["value"][1]) if result else None
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise _Untrusted(SignalProblem.ABSURD, "the answer of Prometheus has an unknown format") from error

    def _observation(self, values: dict[str, float | None]) -> Observation:
        running = self._required(values, "running", "running_age", "hypercore_pool_running", _MOST_AGENTS)
        reporting = _plausible("count of agent_active_sessions", values["reporting"] or 0.0, _MOST_AGENTS)
        if running == 0 and values["sessions"] is None:
            sessions, age = 0.0, 0.0
        else:
            most = _MOST_SESSIONS_PER_AGENT * max(reporting, 1.0)
            sessions = self._required(values, "sessions", "age", "agent_active_sessions of the pool", most)
            age = min(max(0.0, values["age"] or 0.0), self._longest_age)
        return Observation(
            sessions=sessions,
            running=round(running),
            complete=reporting >= running,
            age=age,
            **{name: _known(values[name], most) for name, most in _OPTIONAL.items()},
        )

    def _required(self, values: dict[str, float | None], name: str, age: str, series: str, most: float) -> float:
        value, seconds = values[name], values[age]
        if value is None:
            if seconds is not None:
                raise _Untrusted(
                    SignalProblem.STALE, f"the newest sample of {series} is {seconds:.0f} s old; is it still scraped?"
                )
            raise _Untrusted(SignalProblem.MISSING, f"Prometheus has no {series}; does it scrape the manager?")
        return _plausible(series, value, most)


class ManagerSignals:
    """Signals from the manager's `GET /v1/agents/stats`; the optional ones come from agents' heartbeats."""

    def __init__(self, client: JsonClient) -> None:
        self._client = client

    async def read(self) -> Reading:
        """Return the current reading from the manager."""
        try:
            stats = StatsView.model_validate(await self._client.request("GET", "/v1/agents/stats"))
            return Reading(self._observation(stats))
        except HypercoreError as error:
            return Reading(None, SignalProblem.UNREACHABLE, error.message)
        except ValidationError as error:
            fields = sorted({".".join(map(str, fault["loc"])) for fault in error.errors()})
            return Reading(
                None,
                SignalProblem.MISSING,
                f"the manager's stats have missing or invalid fields: {', '.join(fields[:5])}",
            )
        except _Untrusted as fault:
            return Reading(None, fault.problem, fault.detail)

    def _observation(self, stats: StatsView) -> Observation:
        pool, sessions = stats.pool, stats.pool.sessions
        if sessions is None and not stats.agents_per_user:
            sessions = stats.sessions  # without dedicated agents, all sessions are on the pool
        if sessions is None:
            raise _Untrusted(SignalProblem.MISSING, "the manager's stats lack pool.sessions")
        running, host = _plausible("pool.running", pool.running, _MOST_AGENTS), stats.host
        holders = running + max(0, pool.draining)
        optional = {name: _known(getattr(pool, name, None), most) for name, most in _OPTIONAL.items()}
        return Observation(
            sessions=_plausible("pool.sessions", sessions, _MOST_SESSIONS_PER_AGENT * max(holders, 1)),
            running=round(running),
            spawn_seconds=optional["spawn_seconds"],
            cpu=optional["cpu"],
            memory=optional["memory"],
            queue_wait_seconds=optional["queue_wait_seconds"],
            start_wait_seconds=optional["start_wait_seconds"],
            host_load=_known(host.load / host.processors, _OPTIONAL["host_load"]) if host and host.processors else None,
            api_headroom=optional["api_headroom"],
        )


def _plausible(name: str, value: float, most: float) -> float:
    if not math.isfinite(value) or not 0 <= value <= most:
        raise _Untrusted(SignalProblem.ABSURD, f"{name} is {value:g}; at most {most:g} is possible")
    return value


def _known(value: Any, most: float) -> float | None:
    if value is None or not math.isfinite(value) or not 0 <= value <= most:
        return None
    return float(value)
