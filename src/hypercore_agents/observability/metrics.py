"""All metrics of the platform: one class per role, each with its own registry.

Label sets are bounded (no user, session or agent ids), and every possible label value is created at start, so that a
rate or a ratio never divides by a missing series.
"""

from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from hypercore_agents.api.errors import ERROR_TYPES
from hypercore_agents.api.pool import ScalingAction, ScalingReason, SignalProblem, SizeOutcome

CONTENT_TYPE = CONTENT_TYPE_LATEST
_TURN_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_WAIT_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 30, 60)
_SPAWN_SECONDS = (0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120)
_CHECK_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
REQUEST_STATUSES = ("ok", "client_error", "server_error", "disconnected")
_TOKEN_TYPES = ("input", "output", "cache_read", "cache_creation")


def render(registry: CollectorRegistry) -> bytes:
    """Return the registry in Prometheus' text format."""
    return generate_latest(registry)


def render_shared(folder: Path) -> bytes:
    """Return the metrics of all processes that share a folder, including ended ones."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def forget_process(folder: Path, pid: int) -> None:
    """Remove the gauges of an ended process; its counters remain."""
    mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]


def status_class(status: int) -> str:
    """Return the bounded label for an HTTP status: `ok`, `client_error` or `server_error`."""
    return "ok" if status < 400 else "client_error" if status < 500 else "server_error"


def _latest(name: str, purpose: str, labels: Iterable[str] = (), *, registry: CollectorRegistry) -> Gauge:
    return Gauge(name, purpose, labels, registry=registry, multiprocess_mode="mostrecent")


class AgentMetrics:
    """Metrics of one agent server."""

    ENDPOINTS = ("chat", "session", "interrupt", "stats")
    CLI_STARTS = ("new", "resumed", "prewarmed")

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.active_sessions = Gauge("agent_active_sessions", "Sessions placed on this agent", registry=registry)
        self.live_sessions = Gauge("agent_live_sessions", "Sessions with a Claude CLI process", registry=registry)
        self.parked_sessions = Gauge(
            "agent_parked_sessions", "Placed sessions without a Claude CLI process", registry=registry
        )
        self.cli_memory = Gauge(
            "agent_cli_memory_bytes", "Private memory of all Claude CLI processes", registry=registry
        )
        self.cli_start_seconds = Histogram(
            "agent_cli_start_seconds",
            "Start of a Claude CLI until it is connected",
            ["start"],  # discovery sets the label `kind` to pool or dedicated
            buckets=_SPAWN_SECONDS,
            registry=registry,
        )
        self.running_turns = Gauge("agent_running_turns", "Running turns", registry=registry)
        self.requests = Counter("agent_requests", "Requests", ["endpoint", "status"], registry=registry)
        self.request_seconds = Histogram(
            "agent_request_duration_seconds", "Duration of requests", ["endpoint"],
            buckets=_TURN_SECONDS, registry=registry,
        )  # fmt: skip
        self.first_delta_seconds = Histogram(
            "agent_first_delta_seconds",
            "Start of a turn until its first delta",
            buckets=_TURN_SECONDS,
            registry=registry,
        )
        self.queue_wait_seconds = Histogram(
            "agent_queue_wait_seconds",
            "Time that turns waited for a Claude CLI process",
            buckets=_WAIT_SECONDS,
            registry=registry,
        )
        self.start_wait_seconds = Histogram(
            "agent_start_wait_seconds",
            "Time that starts of Claude CLIs waited for a start slot of this agent and its host",
            buckets=_WAIT_SECONDS,
            registry=registry,
        )
        self.waiting_turns = Gauge("agent_waiting_turns", "Turns waiting for a Claude CLI process", registry=registry)
        self.cpu = Gauge("agent_cpu_utilisation", "Share of the agent's cores in use", registry=registry)
        self.memory = Gauge("agent_memory_utilisation", "Share of the agent's memory in use", registry=registry)
        self.heartbeats = Counter("agent_heartbeats", "Heartbeats to the gateway", ["status"], registry=registry)
        self.model_retries = Counter(
            "agent_model_retries", "Model requests that a Claude CLI repeated", registry=registry
        )
        self.parked = Counter(
            "agent_sessions_parked", "Idle sessions whose Claude CLI was ended to free capacity", registry=registry
        )
        self.resumed = Counter(
            "agent_sessions_resumed", "Sessions that got a new Claude CLI from their transcript", registry=registry
        )
        self.mirror_errors = Counter(
            "agent_mirror_errors", "Parts of transcripts that did not reach the session store", registry=registry
        )
        self.tokens = Counter(
            "agent_token_usage", "Tokens according to the gateway's ledger", ["type"], registry=registry
        )
        self.errors = Counter("agent_errors", "Errors", ["error_type"], registry=registry)
        for endpoint in self.ENDPOINTS:
            self.request_seconds.labels(endpoint)
            for status in REQUEST_STATUSES:
                self.requests.labels(endpoint, status)
        for outcome in ("ok", "failed"):
            self.heartbeats.labels(outcome)
        for start in self.CLI_STARTS:
            self.cli_start_seconds.labels(start)
        for kind in ("input", "output"):
            self.tokens.labels(kind)
        for error_type in ERROR_TYPES:
            self.errors.labels(error_type)


class ManagerMetrics:
    """Metrics of the manager.

    Its gauges describe the store, not a process: if several processes share a folder, the latest value is valid.
    """

    SPAWN_STATUSES = ("success", "failure")
    LOSSES = ("gone", "exited", "silent", "cut_off", "not_ready")
    SPAWN_PHASES = ("wait", "sandbox", "enrol")
    """In order: from the spawn to a start slot; the backend's start; from there until enrolled and ready."""
    DEPENDENCIES = ("store", "key_ring", "blobs", "gateway", "backend")
    POOL_STATES = ("starting", "running", "draining")
    KEYS = ("encryption", "platform", "user", "agent")
    HOST = (("for_agents", "available to agents"), ("given", "allocated to agents"), ("free", "free"))

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.agents = _latest("hypercore_agent_active_count", "Running agents", registry=registry)
        self.spawns = Counter("hypercore_agent_spawn", "Spawns", ["status"], registry=registry)
        self.spawn_seconds = Histogram(
            "hypercore_agent_spawn_duration_seconds",
            "Spawn until ready",
            buckets=_SPAWN_SECONDS,
            registry=registry,
        )
        self.lost = Counter("hypercore_agent_lost", "Running agents declared lost", ["reason"], registry=registry)
        self.spawn_phase_seconds = Histogram(
            "hypercore_agent_spawn_phase_seconds",
            "Duration of the phases of a spawn",
            ["phase"],
            buckets=_SPAWN_SECONDS,
            registry=registry,
        )
        self.reconcile_lag_seconds = Histogram(
            "hypercore_reconcile_lag_seconds",
            "Delay of reconciling an agent that is due",
            buckets=_WAIT_SECONDS,
            registry=registry,
        )
        self.requests = Counter("hypercore_manager_requests", "Requests", ["route", "status"], registry=registry)
        self.turns = Counter("hypercore_manager_turns", "Turns relayed", ["status"], registry=registry)
        self.pool_desired = _latest("hypercore_pool_desired", "Desired size of the pool", registry=registry)
        self.pool_running = _latest("hypercore_pool_running", "Running agents of the pool", registry=registry)
        self.pool_minimum = _latest("hypercore_pool_minimum", "Minimum size of the pool", registry=registry)
        self.pool_maximum = _latest("hypercore_pool_maximum", "Maximum size of the pool", registry=registry)
        self.pool_agents = _latest("hypercore_pool_agents", "Agents of the pool", ["state"], registry=registry)
        self.key_age = _latest(
            "hypercore_key_age_seconds",
            "Age of the oldest stored key of a kind; 0 if there is none",
            ["kind"],
            registry=registry,
        )
        self.dependency_up = _latest(
            "hypercore_manager_dependency_up",
            "1 if a dependency of the manager is available, else 0",
            ["dependency"],
            registry=registry,
        )
        self.state_free = _latest("hypercore_state_free_bytes", "Free space on STATE_DIR's disk", registry=registry)
        self.state_size = _latest("hypercore_state_size_bytes", "Size of STATE_DIR's disk", registry=registry)
        self.host_load = _latest(
            "hypercore_host_load", "Load average of this host over the last minute", registry=registry
        )
        self.host_processors = _latest("hypercore_host_processors", "Processors of this host", registry=registry)
        self.host_sandboxes = _latest(
            "hypercore_host_sandboxes",
            "Sandboxes (microVMs, processes) with resources of this host",
            registry=registry,
        )
        self.host_memory_charged = _latest(
            "hypercore_host_memory_charged_bytes",
            "Memory that agents and templates use, by control groups; 0 if the backend does not measure it",
            registry=registry,
        )
        self.host = {
            (what, how): _latest(
                f"hypercore_host_{what}_{how}{'' if what == 'cores' else '_bytes'}",
                f"Host of the backend: {what} {meaning}; 0 if the backend does not measure it",
                registry=registry,
            )
            for what in ("cores", "memory", "disk")
            for how, meaning in self.HOST
            if (what, how) != ("cores", "free")
        }
        self.sessions = _latest("hypercore_sessions_placed", "Sessions placed on agents", registry=registry)
        self.errors = Counter("hypercore_manager_errors", "Errors returned", ["error_type"], registry=registry)
        for status in self.SPAWN_STATUSES:
            self.spawns.labels(status)
        for reason in self.LOSSES:
            self.lost.labels(reason)
        for phase in self.SPAWN_PHASES:
            self.spawn_phase_seconds.labels(phase)
        for dependency in self.DEPENDENCIES:
            self.dependency_up.labels(dependency).set(1)
        for state in self.POOL_STATES:
            self.pool_agents.labels(state)
        for kind in self.KEYS:
            self.key_age.labels(kind)
        for status in REQUEST_STATUSES:
            self.turns.labels(status)
        for error_type in ERROR_TYPES:
            self.errors.labels(error_type)


class GatewayMetrics:
    """Metrics of the gateway. `models` are the label values of tokens and cost; `other` is added to them."""

    OTHER_MODEL = "other"
    RATE_LIMITS = ("requests", "tokens", "input_tokens", "output_tokens")
    """Limits of the Claude API, by its headers `anthropic-ratelimit-KIND-limit` and `-remaining`."""

    DEPENDENCIES = ("store", "key_ring", "blobs")
    UPSTREAM_STATUSES = ("2xx", "3xx", "4xx", "429", "5xx", "unreachable", "cut")
    REFUSALS = ("token", "placement", "route", "body", "policy", "budget", "concurrency")
    ENROLMENTS = ("success", "repeated", "unknown", "foreign", "expired", "replayed", "not_starting")

    def __init__(self, registry: CollectorRegistry, models: Iterable[str] = ()) -> None:
        self.registry = registry
        self.models = frozenset({*models, self.OTHER_MODEL})
        self.upstream = Counter(
            "hypercore_gateway_upstream_requests",
            "Model requests by the Claude API's response",
            ["status"],
            registry=registry,
        )
        self.overhead_seconds = Histogram(
            "hypercore_gateway_overhead_seconds",
            "Model request received until sent: the time of the gateway's own checks",
            buckets=_CHECK_SECONDS,
            registry=registry,
        )
        self.unbilled = Counter(
            "hypercore_gateway_ledger_failures",
            "Model requests whose usage could not be written to the ledger",
            registry=registry,
        )
        self.open_streams = Gauge("hypercore_gateway_open_streams", "Open model streams", registry=registry)
        self.answer_seconds = Histogram(
            "hypercore_gateway_upstream_answer_seconds",
            "Model request sent until the Claude API's answer begins",
            buckets=_TURN_SECONDS,
            registry=registry,
        )
        self.tokens = Counter("hypercore_gateway_tokens", "Tokens metered", ["model", "type"], registry=registry)
        self.cost = Counter("hypercore_gateway_cost_usd", "Cost metered, USD", ["model"], registry=registry)
        self.nearly_spent = Counter(
            "hypercore_gateway_budget_nearly_spent",
            "Model requests of sessions with less than a tenth of their budget left",
            registry=registry,
        )
        self.headroom = Gauge(
            "hypercore_gateway_rate_limit_headroom",
            "Remaining share of the Claude API's rate limits of the platform's key; 1 before the first answer",
            ["kind"],
            registry=registry,
        )
        self.dependency_up = Gauge(
            "hypercore_gateway_dependency_up",
            "1 if a dependency of the gateway is available, else 0",
            ["dependency"],
            registry=registry,
        )
        self.refusals = Counter("hypercore_gateway_refusals", "Rejected requests", ["reason"], registry=registry)
        self.enrolments = Counter("hypercore_gateway_enrolments", "Enrolments", ["status"], registry=registry)
        for status in self.UPSTREAM_STATUSES:
            self.upstream.labels(status)
        for model in self.models:
            self.cost.labels(model)
            for kind in _TOKEN_TYPES:
                self.tokens.labels(model, kind)
        for kind in self.RATE_LIMITS:
            self.headroom.labels(kind).set(1)
        for dependency in self.DEPENDENCIES:
            self.dependency_up.labels(dependency).set(1)
        for reason in self.REFUSALS:
            self.refusals.labels(reason)
        for outcome in self.ENROLMENTS:
            self.enrolments.labels(outcome)


class AutoscalerMetrics:
    """Metrics of the autoscaler."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        prefix = "hypercore_autoscaler"
        self.decisions = Counter(f"{prefix}_decisions", "Decisions", ["action", "reason"], registry=registry)
        self.outcomes = Counter(f"{prefix}_outcomes", "Outcomes of decisions", ["outcome"], registry=registry)
        self.problems = Counter(f"{prefix}_signal_problems", "Rejected signals", ["problem"], registry=registry)
        self.desired = Gauge(f"{prefix}_desired_agents", "Size of the pool by the last decision", registry=registry)
        self.wanted = Gauge(f"{prefix}_wanted_agents", "Desired size of the pool at the manager", registry=registry)
        self.running = Gauge(f"{prefix}_running_agents", "Running agents of the pool by the signals", registry=registry)
        self.sessions = Gauge(f"{prefix}_sessions", "Sessions on the pool by the signals", registry=registry)
        self.expected = Gauge(
            f"{prefix}_expected_sessions",
            "Sessions expected when an agent that starts now is ready",
            registry=registry,
        )
        self.decided_at = Gauge(f"{prefix}_decided_timestamp_seconds", "Time of the last decision", registry=registry)
        self.step_seconds = Histogram(
            f"{prefix}_step_seconds",
            "Duration of a step: read signals, decide, set the size",
            buckets=_TURN_SECONDS,
            registry=registry,
        )
        for action in ScalingAction:
            for reason in ScalingReason:
                self.decisions.labels(action, reason)
        for outcome in SizeOutcome:
            self.outcomes.labels(outcome)
        for problem in SignalProblem:
            self.problems.labels(problem)
