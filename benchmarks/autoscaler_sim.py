"""Compares autoscaling rules on the same loads: ours, upstream's, and Kubernetes' formula.

For each trace and spawn time: unserved session-seconds, agent-hours (an agent costs from the moment that it
is ordered), flaps (a change against the direction of one less than 10 minutes before), and the reference: the least
agent-hours with knowledge of the future, with agents filled to at most 0.80. `--plots DIR` draws the pool sizes (needs
the extra `plots`).

The simulated system: metrics are scraped every 5 s and read 2 s later; an agent serves `spawn time` seconds after it
was ordered; a removed agent is gone at once, for every rule.

Aims: never more unserved than either of the others; none on the ramp of 10,000 users at a spawn time of 10 s;
agent-hours within 1.25 of the reference.
"""

import math
from pathlib import Path
from typing import Any

from autoscaler_rules import MINIMUM, SESSIONS, Kubernetes, Ours, Rule, Upstream
from autoscaler_runs import RuleRun
from autoscaler_traces import Trace, traces
from measuring import arguments, progress, table, write_json

from hypercore_agents.autoscaler.policy import PolicySettings

SPAWN_SECONDS = (1, 10, 60)
SCRAPE_SECONDS, READ_AFTER = 5, 2
FLAP_SECONDS = 600
REFERENCE_USAGE = 0.80
AIM_HOURS = 1.25


def simulate(trace: Trace, spawn: int, rule: Rule) -> RuleRun:
    """Simulate the pool under one rule."""
    rule_run = RuleRun(trace.name, spawn, rule.name)
    running = max(MINIMUM, math.ceil(trace.wanted[0] / (0.70 * SESSIONS)))
    wanted, starting = running, list[int]()
    scraped, scraped_at = (0.0, running), 0
    changed: tuple[int, int] | None = None
    for now, load in enumerate(trace.wanted):
        ready = sum(at <= now for at in starting)
        running, starting = running + ready, starting[ready:]
        placed = min(load, running * SESSIONS)
        rule_run.unserved += load - placed
        rule_run.agent_seconds += running + len(starting)
        rule_run.running.append(running)
        if now % SCRAPE_SECONDS == 0 and trace.readable(now):
            scraped, scraped_at = (placed, running), now
        if now % rule.every != READ_AFTER:
            continue
        seen = scraped if now - scraped_at < 3 * SCRAPE_SECONDS else None
        size = rule.size(now, now - scraped_at, seen, wanted)
        if size == wanted:
            continue
        direction = 1 if size > wanted else -1
        if changed is not None and changed[1] == -direction and now - changed[0] < FLAP_SECONDS:
            rule_run.flaps += 1
        changed = (now, direction)
        wanted = size
        surplus = running + len(starting) - wanted
        if surplus > 0:
            cancelled = min(surplus, len(starting))
            starting = starting[: len(starting) - cancelled]
            running -= surplus - cancelled
        else:
            starting += [now + spawn] * -surplus
    return rule_run


def reference(trace: Trace, spawn: int) -> int:
    """Return the minimum agent-seconds that serve the trace at `REFERENCE_USAGE` with the future known.

    Agent number k is needed while at least k agents are. Between two such spans it runs on if that costs no more than a
    new start; a start costs `spawn` seconds. `MINIMUM` agents always run.
    """
    needed: list[int] = [math.ceil(load / (REFERENCE_USAGE * SESSIONS)) for load in trace.wanted]
    total = MINIMUM * len(needed)
    at_start = max(MINIMUM, needed[0])
    for layer in range(MINIMUM + 1, max(needed) + 1):
        free_since: int | None = 0 if layer <= at_start else None
        for second, size in enumerate(needed):
            if size < layer:
                continue
            idle = min(spawn, second) if free_since is None else min(spawn, second - free_since)
            total += 1 + idle
            free_since = second + 1
    return total


def run(quick: bool) -> list[RuleRun]:
    """Simulate every trace, spawn time and rule."""
    rule_runs = []
    strict = PolicySettings(consolidation_window=0)
    for trace in traces(quick):
        for spawn in SPAWN_SECONDS:
            least = reference(trace, spawn)
            banded = Ours(spawn, name="ours, dead band", settings=strict)
            rules: list[Rule] = [Ours(spawn), banded, Upstream(), Kubernetes()]
            for rule in rules:
                rule_run = simulate(trace, spawn, rule)
                rule_run.reference_seconds = least
                rule_runs.append(rule_run)
        progress(f"simulated: {trace.name}")
    return rule_runs


def judge(rule_runs: list[RuleRun]) -> dict[str, Any]:
    """Compare the figures with the aims and list the misses."""
    ours = [rule_run for rule_run in rule_runs if rule_run.rule == "ours"]
    others = {(c.trace, c.spawn, c.rule): c.unserved for c in rule_runs if not c.rule.startswith("ours")}
    worse = [
        f"{rule_run.trace}, {rule_run.spawn} s: {rule_run.unserved:.0f} against {rule}'s {unserved:.0f}"
        for rule_run in ours
        for (trace, spawn, rule), unserved in others.items()
        if (trace, spawn) == (rule_run.trace, rule_run.spawn) and rule_run.unserved > unserved
    ]
    ramp = next(rule_run.unserved for rule_run in ours if rule_run.trace.startswith("ramp") and rule_run.spawn == 10)
    expensive = [f"{c.trace}, {c.spawn} s: {c.ratio:.2f}" for c in ours if c.ratio > AIM_HOURS]
    return {
        "never_more_unserved": {"met": not worse, "misses": worse},
        "none_unserved_on_the_ramp_at_10_s": {"met": ramp == 0, "unserved_session_seconds": ramp},
        "agent_hours_within_1.25_of_the_reference": {"met": not expensive, "misses": expensive},
    }


def main() -> None:
    """Run from the command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw one PNG per trace here")
    options = parser.parse_args()
    rule_runs = run(options.quick)
    for spawn in SPAWN_SECONDS:
        rows = [
            [c.trace, c.rule, f"{c.unserved:,.0f}", f"{c.agent_seconds / 3600:,.1f}", f"{c.ratio:.2f}", str(c.flaps)]
            for c in rule_runs
            if c.spawn == spawn
        ]
        columns = ["trace", "rule", "unserved session-s", "agent-hours", "of reference", "flaps"]
        table(f"Spawn time {spawn} s", columns, rows)
    aims = judge(rule_runs)
    for name, found in aims.items():
        progress(f"aim {name.replace('_', ' ')}: {'met' if found['met'] else 'missed: ' + str(found)}")
    if options.plots is not None:
        from autoscaler_plots import draw

        draw(rule_runs, traces(options.quick), options.plots)
    figures = [
        {
            "trace": c.trace,
            "spawn_seconds": c.spawn,
            "rule": c.rule,
            "unserved_session_seconds": round(c.unserved),
            "agent_hours": round(c.agent_seconds / 3600, 3),
            "reference_agent_hours": round(c.reference_seconds / 3600, 3),
            "of_reference": round(c.ratio, 4),
            "flaps": c.flaps,
        }
        for c in rule_runs
    ]
    met = all(found["met"] for found in aims.values())
    write_json(
        options.json,
        {"benchmark": "autoscaler_sim", "quick": options.quick, "aims_met": met, "aims": aims, "runs": figures},
    )


if __name__ == "__main__":
    main()
