"""Draws the dashboard's panels from a Prometheus into one PNG, without Grafana (extra `plots`).

    python monitoring/render.py http://127.0.0.1:9090 dashboard.png --minutes 15

Panels, queries and units are those of the dashboard: both come from `panels.py`. Vertical lines are the autoscaler's
decisions, like the dashboard's annotations.
"""

import argparse
import json
import math
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.dates
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from panels import DECISIONS, ROWS, PanelSpec, resolved

_dates: Any = matplotlib.dates  # has no types
_COLUMNS = 4
_UNITS = {
    "s": "s",
    "percentunit": "share",
    "reqps": "requests/s",
    "ops": "1/s",
    "bytes": "MB",
    "currencyUSD": "USD",
    "short": "",
}
_SCALE = {"bytes": 2**-20}


class NoPrometheus(Exception):
    """Prometheus does not respond, or refuses a query; the message has the reason."""


def fetch(base: str, expression: str, *, seconds: float, step: float) -> list[tuple[dict[str, str], Any, Any]]:
    """Return each series of a range query as labels, times (days since 1970) and values. Raises NoPrometheus."""
    now = time.time()
    asked = {"query": expression, "start": f"{now - seconds:.3f}", "end": f"{now:.3f}", "step": f"{step:g}"}
    url = f"{base.rstrip('/')}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  the operator gives the address
            document = json.load(answer)
    except (OSError, ValueError) as error:
        raise NoPrometheus(f"{base}: {error} (query: {expression})") from None
    found = []
    for series in document["data"]["result"]:
        points = [(float(at) / 86_400, float(value)) for at, value in series["values"]]
        found.append((series["metric"], [at for at, _ in points], [value for _, value in points]))
    return found


def named(legend: str, labels: dict[str, str]) -> str:
    """Return a legend with its `{{label}}` replaced; without a legend, all labels."""
    for name, value in labels.items():
        legend = legend.replace("{{" + name + "}}", value)
    return legend or ", ".join(value for name, value in labels.items() if name != "__name__")


def draw(axes: Axes, spec: PanelSpec, base: str, *, seconds: float, step: float) -> int:
    """Draw one panel; return how many series it shows."""
    axes.set_title(spec.title, fontsize=9, loc="left", fontweight="bold")
    scale = _SCALE.get(spec.unit, 1)
    shown, newest = [], math.nan
    for query in spec.queries:
        expression = resolved(query.expression)
        for labels, times, values in fetch(base, expression, seconds=seconds, step=step):
            shown.append((named(query.legend, labels), times, [value * scale for value in values]))
            newest = values[-1] * scale
    if spec.stat:
        axes.axis("off")
        text = "no data" if math.isnan(newest) else f"{newest:.1%}" if spec.unit == "percentunit" else f"{newest:.4g}"
        axes.text(0.0, 0.35, f"{text} {'USD' if spec.unit == 'currencyUSD' else ''}", fontsize=22)
        return len(shown)
    for name, times, values in shown:
        axes.plot(times, values, label=name[:28], linewidth=1.3, marker="." if len(times) < 3 else None)
    axes.set_ylabel(_UNITS.get(spec.unit, spec.unit), fontsize=7)
    axes.xaxis.set_major_formatter(_dates.DateFormatter("%H:%M"))
    axes.xaxis.set_major_locator(_dates.AutoDateLocator(maxticks=5))
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if shown:
        axes.legend(fontsize=6, ncols=2, loc="upper left", framealpha=0.6)
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="grey")
    return len(shown)


def render(base: str, target: Path, *, minutes: float, step: float = 5.0) -> dict[str, int]:
    """Draw every panel into one PNG; return how many series each shows. Raises NoPrometheus."""
    seconds = minutes * 60
    decisions = fetch(base, resolved(DECISIONS), seconds=seconds, step=step)
    heights = [0.45 if row.panels[0].stat else math.ceil(len(row.panels) / _COLUMNS) for row in ROWS]
    figure = plt.figure(figsize=(22, 2.9 * sum(heights)), layout="constrained")
    figure.suptitle(f"Hypercore Agents: the last {minutes:g} minutes", fontsize=14, x=0.01, ha="left")
    shown: dict[str, int] = {}
    boxes: Any = figure.subfigures(len(ROWS), 1, height_ratios=heights)
    for row, box in zip(ROWS, boxes, strict=True):
        columns = len(row.panels) if row.panels[0].stat else min(_COLUMNS, len(row.panels))
        box.suptitle(row.title, fontsize=11, x=0.01, ha="left", color="tab:blue")
        grid = box.subplots(math.ceil(len(row.panels) / columns), columns, squeeze=False)
        for axes in grid.flat[len(row.panels) :]:
            axes.axis("off")
        for spec, axes in zip(row.panels, grid.flat, strict=False):
            shown[spec.title] = draw(axes, spec, base, seconds=seconds, step=step)
            if spec.title == "Desired and ready":
                for _, times, _ in decisions:
                    for at in times[:1]:
                        axes.axvline(at, color="tab:orange", linestyle="--", linewidth=1)
    figure.savefig(target, dpi=70)
    plt.close(figure)
    return shown


def main(arguments: list[str]) -> int:
    """Draw what the command line says. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Draw the dashboard's panels from a Prometheus into a PNG.")
    parser.add_argument("prometheus", help="base URL, for example http://127.0.0.1:9090")
    parser.add_argument("target", type=Path, help="PNG to write")
    parser.add_argument("--minutes", type=float, default=15, help="how far back (default: 15)")
    given = parser.parse_args(arguments)
    try:
        shown = render(given.prometheus, given.target, minutes=given.minutes)
    except NoPrometheus as error:
        sys.stderr.write(f"{error}\n")
        return 2
    empty = [title for title, series in shown.items() if not series]
    sys.stdout.write(f"{given.target}: {len(shown)} panels{f', without data: {empty}' if empty else ''}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
