"""The quick run of the autoscaler benchmark meets its aims. It is deterministic: only a changed rule can break it."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "autoscaler_sim.py"


def test_the_policy_meets_its_aims(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["aims_met"], found["aims"]
    assert {run["rule"] for run in found["runs"]} >= {"ours", "upstream", "kubernetes"}
    assert {run["spawn_seconds"] for run in found["runs"]} == {1, 10, 60}
    assert len({run["trace"] for run in found["runs"]}) == 6
