"""The content of the dashboard as data: rows of panels with their queries, units and descriptions.

`dashboard.py` generates Grafana's JSON from it, `render.py` draws it without Grafana, and a test runs every query
against a Prometheus that scraped a running platform. `$pool` stands for the selected kinds of agents (label `kind`),
`$__rate_interval` for a window of a few scrapes.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Query:
    """One line, or family of lines, of a panel."""

    expression: str
    legend: str = ""
    sparse: bool = False
    """Whether the query may return no series: for errors, only the kinds that occurred are shown."""


@dataclass(frozen=True)
class PanelSpec:
    """One panel. `unit` is Grafana's name of the unit; `stat` shows only the newest value."""

    title: str
    queries: tuple[Query, ...]
    description: str
    unit: str = "short"
    stat: bool = False
    stacked: bool = False
    maximum: float | None = None


@dataclass(frozen=True)
class Row:
    """A titled row of related panels."""

    title: str
    panels: tuple[PanelSpec, ...] = field(default=())


_POOL = 'kind=~"$pool"'
_RATE = "$__rate_interval"

DECISIONS = 'sum by (action, reason) (increase(hypercore_autoscaler_decisions_total{action!="hold"}[1m])) > 0'
"""The autoscaler's decisions that changed the pool's size, for annotations."""


def _quantiles(histogram: str, labels: str, *shares: float, by: str = "") -> tuple[Query, ...]:
    group = f"le, {by}" if by else "le"
    legend = f" {{{{{by}}}}}" if by else ""
    return tuple(
        Query(
            f"histogram_quantile({share}, sum by ({group}) (rate({histogram}_bucket{labels}[{_RATE}])))",
            f"p{round(share * 100)}{legend}",
        )
        for share in shares
    )


def _rate(counter: str, by: str, labels: str = "") -> tuple[Query, ...]:
    return (Query(f"sum by ({by}) (rate({counter}{labels}[{_RATE}]))", f"{{{{{by}}}}}"),)


def _ten_highest(expression: str, legend: str, *, sparse: bool = False) -> Query:
    """Return a query for the ten highest series in the displayed time range."""
    return Query(
        f"({expression}) and topk(10, max_over_time(({expression})[$__range:$__interval] @ end()))", legend, sparse
    )


def _by_kind(counter: str, by: str, labels: str = "") -> tuple[Query, ...]:
    """Return queries for the total rate and the rates of the ten most frequent kinds that occurred."""
    kinds = f"sum by ({by}) (rate({counter}{labels}[{_RATE}])) > 0"
    return (Query(f"sum(rate({counter}{labels}[{_RATE}]))", "all"), _ten_highest(kinds, f"{{{{{by}}}}}", sparse=True))


def _by_agent(gauge: str) -> tuple[Query, ...]:
    """Return queries for the median and the 95th percentile over all agents, and the ten highest agents."""
    series = f"{gauge}{{{_POOL}}}"
    return (
        Query(f"quantile(0.5, {series})", "p50 of agents"),
        Query(f"quantile(0.95, {series})", "p95 of agents"),
        _ten_highest(series, "{{instance}}"),
    )


def _host(what: str, title: str) -> PanelSpec:
    return PanelSpec(
        f"{title} of the host",
        (
            Query(f"max(hypercore_host_{what}_for_agents_bytes)", "for agents"),
            Query(f"max(hypercore_host_{what}_given_bytes)", "allocated to agents"),
            Query(f"min(hypercore_host_{what}_free_bytes)", "free"),
        ),
        "Allocated: reserved for agents. Free: as the host reports it. A spawn that does not fit is rejected with 503.",
        unit="bytes",
    )


ROWS = (
    Row(
        "Now",
        (
            PanelSpec(
                "Sessions",
                (Query(f"sum(agent_active_sessions{{{_POOL}}})"),),
                "Sessions placed on agents.",
                stat=True,
            ),
            PanelSpec("Agents", (Query("max(hypercore_agent_active_count)"),), "Running agents.", stat=True),
            PanelSpec(
                "Successful chats",
                (Query("hypercore:agent_chat_success:ratio_rate5m"),),
                "Share over five minutes, without faults of clients.",
                unit="percentunit",
                stat=True,
            ),
            PanelSpec(
                "Cost of the last hour",
                (Query("hypercore:cost_usd:increase1h"),),
                "USD, as metered by the gateway.",
                unit="currencyUSD",
                stat=True,
            ),
            PanelSpec(
                "Firing alerts",
                (Query('count(ALERTS{alertstate="firing"}) or vector(0)'),),
                "See Alertmanager; each alert links its runbook.",
                stat=True,
            ),
        ),
    ),
    Row(
        "Sessions and queue",
        (
            PanelSpec(
                "Sessions, real time",
                (
                    Query(f"sum(agent_active_sessions{{{_POOL}}})", "placed"),
                    Query(f"sum(agent_live_sessions{{{_POOL}}})", "live"),
                    Query(f"sum(agent_parked_sessions{{{_POOL}}})", "parked"),
                    Query(f"sum(agent_running_turns{{{_POOL}}})", "in a turn"),
                ),
                "Placed sessions. A live session has a Claude CLI process; a parked one gets one with its next turn.",
            ),
            PanelSpec(
                "Queue",
                (Query(f"sum(agent_waiting_turns{{{_POOL}}})", "turns waiting"),),
                "Turns that wait for a Claude CLI process.",
            ),
            PanelSpec(
                "Queue wait",
                _quantiles("agent_queue_wait_seconds", f"{{{_POOL}}}", 0.5, 0.95),
                "Wait of turns for a Claude CLI process.",
                unit="s",
            ),
            PanelSpec(
                "Start wait",
                _quantiles("agent_start_wait_seconds", f"{{{_POOL}}}", 0.5, 0.95),
                "Wait of starts of Claude CLIs for a processor of their agent and host.",
                unit="s",
            ),
            PanelSpec(
                "Parked and resumed",
                (
                    Query(f"sum(rate(agent_sessions_parked_total{{{_POOL}}}[{_RATE}]))", "parked"),
                    Query(f"sum(rate(agent_sessions_resumed_total{{{_POOL}}}[{_RATE}]))", "resumed"),
                ),
                "High rates of both mean that agents have too little memory for their sessions.",
                unit="ops",
            ),
        ),
    ),
    Row(
        "Requests",
        (
            PanelSpec(
                "Requests by outcome",
                _rate("agent_requests_total", "status", f"{{{_POOL}}}"),
                "Responses of agents.",
                unit="reqps",
                stacked=True,
            ),
            PanelSpec(
                "Requests by endpoint",
                _rate("agent_requests_total", "endpoint", f"{{{_POOL}}}"),
                "Requests to agents.",
                unit="reqps",
            ),
            PanelSpec(
                "Turn latency",
                _quantiles("agent_request_duration_seconds", f'{{endpoint="chat",{_POOL}}}', 0.5, 0.95, 0.99),
                "Duration of turns, including their tools.",
                unit="s",
            ),
            PanelSpec(
                "Time to first delta",
                _quantiles("agent_first_delta_seconds", f"{{{_POOL}}}", 0.5, 0.95, 0.99),
                "From the start of a turn to its first text.",
                unit="s",
            ),
        ),
    ),
    Row(
        "Model",
        (
            PanelSpec(
                "Tokens by type",
                _rate("hypercore_gateway_tokens_total", "type"),
                "Tokens per second, as metered by the gateway.",
                stacked=True,
            ),
            PanelSpec(
                "Tokens of agents",
                _rate("agent_token_usage_total", "type", f"{{{_POOL}}}"),
                "Tokens per second, as agents read them from the ledger.",
            ),
            PanelSpec(
                "Cost by model",
                (Query("sum by (model) (increase(hypercore_gateway_cost_usd_total[1h])) > 0", "{{model}}"),),
                "USD over the last hour.",
                unit="currencyUSD",
                stacked=True,
            ),
            PanelSpec(
                "Model requests by response",
                _rate("hypercore_gateway_upstream_requests_total", "status"),
                "Responses of the Claude API.",
                unit="reqps",
                stacked=True,
            ),
            PanelSpec(
                "Model's first byte",
                _quantiles("hypercore_gateway_upstream_answer_seconds", "", 0.5, 0.95),
                "From sending a model request to the start of its answer: the Claude API's part of the latency.",
                unit="s",
            ),
            PanelSpec(
                "Rate limit headroom",
                (Query("min by (kind) (hypercore_gateway_rate_limit_headroom)", "{{kind}}"),),
                "Unused share of the Claude API's limits, by its last answer.",
                unit="percentunit",
                maximum=1,
            ),
            PanelSpec(
                "Rejected model requests",
                _by_kind("hypercore_gateway_refusals_total", "reason"),
                "Model requests that the gateway rejected; `budget`: the budget is spent.",
                unit="reqps",
            ),
        ),
    ),
    Row(
        "Errors",
        (
            PanelSpec(
                "Errors by type",
                _by_kind("agent_errors_total", "error_type", f"{{{_POOL}}}"),
                "Errors returned by agents.",
                unit="ops",
            ),
            PanelSpec(
                "Errors at the front door",
                _by_kind("hypercore_manager_errors_total", "error_type"),
                "Errors returned by the manager.",
                unit="ops",
            ),
            PanelSpec(
                "Transcripts and ledger",
                (
                    Query("sum(increase(agent_mirror_errors_total[10m]))", "mirror errors"),
                    Query("sum(increase(hypercore_gateway_ledger_failures_total[10m]))", "ledger failures"),
                ),
                "Both must be 0. Otherwise parts of transcripts or of the ledger are missing.",
            ),
        ),
    ),
    Row(
        "Spawns",
        (
            PanelSpec(
                "Spawns", _rate("hypercore_agent_spawn_total", "status"), "Agents that started, and starts that failed."
            ),
            PanelSpec(
                "Spawn to ready",
                _quantiles("hypercore_agent_spawn_duration_seconds", "", 0.5, 0.95),
                "Time from spawn to ready.",
                unit="s",
            ),
            PanelSpec(
                "Phases of a spawn",
                (
                    Query(
                        f"sum by (phase) (rate(hypercore_agent_spawn_phase_seconds_sum[{_RATE}]))"
                        f" / sum by (phase) (rate(hypercore_agent_spawn_phase_seconds_count[{_RATE}]))",
                        "{{phase}}",
                    ),
                ),
                "Mean durations: the wait before the start, the start of the sandbox, enrolment to ready.",
                unit="s",
                stacked=True,
            ),
            PanelSpec(
                "Start of a Claude CLI",
                _quantiles("agent_cli_start_seconds", f"{{{_POOL}}}", 0.95, by="start"),
                "Duration of starts: new, or resumed from a transcript.",
                unit="s",
            ),
            PanelSpec(
                "Agents lost",
                _by_kind("hypercore_agent_lost_total", "reason"),
                "Running agents that the manager declared lost and replaced.",
            ),
            PanelSpec(
                "Reconciler's lag",
                _quantiles("hypercore_reconcile_lag_seconds", "", 0.5, 0.95),
                "Delay of reconciling agents that are due.",
                unit="s",
            ),
        ),
    ),
    Row(
        "Pool",
        (
            PanelSpec(
                "Desired and ready",
                (
                    Query("max(hypercore_pool_desired)", "desired"),
                    Query("max(hypercore_pool_running)", "ready"),
                    Query("max(hypercore_pool_minimum)", "MIN_AGENTS"),
                    Query("max(hypercore_pool_maximum)", "MAX_AGENTS"),
                ),
                "Annotations show the autoscaler's decisions.",
            ),
            PanelSpec(
                "Agents by state",
                (Query("max by (state) (hypercore_pool_agents)", "{{state}}"),),
                "Agents of the pool.",
                stacked=True,
            ),
            PanelSpec(
                "Decisions",
                (
                    Query(
                        f"sum by (action, reason) (rate(hypercore_autoscaler_decisions_total[{_RATE}])) > 0",
                        "{{action}}: {{reason}}",
                    ),
                ),
                "The autoscaler's decisions and their reasons.",
            ),
            PanelSpec(
                "Rejected signals",
                _by_kind("hypercore_autoscaler_signal_problems_total", "problem"),
                "While signals are rejected, the pool does not shrink.",
            ),
        ),
    ),
    Row(
        "Resources",
        (
            PanelSpec(
                "CPU by agent",
                _by_agent("agent_cpu_utilisation"),
                "Share of the agent's cores: median and 95th percentile, and the ten highest agents.",
                unit="percentunit",
            ),
            PanelSpec(
                "Memory by agent",
                _by_agent("agent_memory_utilisation"),
                "Share of the agent's memory: median and 95th percentile, and the ten highest agents.",
                unit="percentunit",
            ),
            PanelSpec(
                "Memory of Claude CLIs",
                _by_agent("agent_cli_memory_bytes"),
                "Private memory of all Claude CLI processes of an agent.",
                unit="bytes",
            ),
            PanelSpec(
                "Dependencies",
                (
                    Query("min by (dependency) (hypercore_manager_dependency_up)", "manager: {{dependency}}"),
                    Query("min by (dependency) (hypercore_gateway_dependency_up)", "gateway: {{dependency}}"),
                ),
                "1: available to every process of the role, including writes; 0: not.",
                maximum=1,
            ),
            PanelSpec(
                "Disk of the state",
                (Query("min(hypercore_state_free_bytes / hypercore_state_size_bytes)", "free"),),
                "Free share of the disk.",
                unit="percentunit",
                maximum=1,
            ),
            PanelSpec(
                "Age of keys",
                (Query("max by (kind) (hypercore_key_age_seconds)", "{{kind}}"),),
                "Age of the oldest stored key of each kind; 0: none.",
                unit="s",
            ),
        ),
    ),
    Row(
        "Host",
        (
            PanelSpec(
                "Cores of the host",
                (
                    Query("max(hypercore_host_cores_for_agents)", "for agents"),
                    Query("max(hypercore_host_cores_given)", "allocated to agents"),
                    Query("max(hypercore_host_load)", "demanded by all processes"),
                ),
                "Including CPU_OVERCOMMIT. A spawn that does not fit is rejected with 503.",
            ),
            _host("memory", "Memory"),
            _host("disk", "Disk"),
            PanelSpec(
                "Sandboxes of the host",
                (Query("max(hypercore_host_sandboxes)", "sandboxes"),),
                "Sandboxes (microVMs or processes) that use cores, memory and disk of the host.",
            ),
        ),
    ),
)


def resolved(expression: str, *, pool: str = ".*", window: str = "1m") -> str:
    """Return the expression for Prometheus, with Grafana's variables replaced."""
    filled = {"$__rate_interval": window, "$__range": "5m", "$__interval": "5s", "$pool": pool}
    for variable, value in filled.items():
        expression = expression.replace(variable, value)
    return expression
