"""Plot the pool sizes of `autoscaler_sim.py`: a PNG per trace, a panel per spawn time. Requires the extra `plots`."""

from collections.abc import Sequence
from pathlib import Path

from autoscaler_rules import SESSIONS
from autoscaler_runs import RuleRun
from autoscaler_traces import Trace
from matplotlib import pyplot

_COLOURS = {"ours": "#1a7f37", "ours, dead band": "#9ccfae", "upstream": "#c4432b", "kubernetes": "#2f6fd0"}
_MOST_POINTS = 2000


def draw(rule_runs: Sequence[RuleRun], traces: Sequence[Trace], folder: Path) -> None:
    """Write one PNG per trace: the load, and the running capacity under each rule, in sessions."""
    pyplot.switch_backend("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for trace in traces:
        shown = [rule_run for rule_run in rule_runs if rule_run.trace == trace.name]
        spawns = sorted({rule_run.spawn for rule_run in shown})
        figure, panels = pyplot.subplots(len(spawns), 1, figsize=(10, 3 * len(spawns)), sharex=True, squeeze=False)
        step = max(1, len(trace.wanted) // _MOST_POINTS)
        hours = [second / 3600 for second in range(0, len(trace.wanted), step)]
        for panel, spawn in zip(panels[:, 0], spawns, strict=True):
            panel.fill_between(hours, trace.wanted[::step], color="#d8d8d8", label="requested sessions")
            for start, end in trace.missing:
                panel.axvspan(start / 3600, end / 3600, color="#f4d35e", alpha=0.4, label="no metrics")
            for rule_run in (rule_run for rule_run in shown if rule_run.spawn == spawn):
                capacity = [agents * SESSIONS for agents in rule_run.running[::step]]
                panel.plot(hours, capacity, color=_COLOURS[rule_run.rule], linewidth=1.2, label=rule_run.rule)
            panel.set_title(f"{trace.name}, spawn time {spawn} s", loc="left", fontsize=10)
            panel.set_ylabel("sessions")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        panels[0, 0].legend(unique.values(), unique.keys(), fontsize=8, loc="upper right")
        panels[-1, 0].set_xlabel("hours")
        figure.tight_layout()
        figure.savefig(folder / f"{trace.name.replace(' ', '-').replace(',', '')}.png", dpi=110)
        pyplot.close(figure)
