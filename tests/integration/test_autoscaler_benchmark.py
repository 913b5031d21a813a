"""The benchmark's quick run meets its aims; deterministic, so a change that breaks one shows here."""

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
    assert {course["rule"] for course in found["courses"]} >= {"ours", "upstream", "kubernetes"}
    assert {course["spawn_seconds"] for course in found["courses"]} == {1, 10, 60}
    assert len({course["trace"] for course in found["courses"]}) == 6
