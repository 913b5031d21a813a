#!/usr/bin/env python3
"""Load test of a running platform; the same as `hypercore-agents loadtest`.

tests/load-test-claude-agents.py --api-url URL --users 10 --requests 5 --ramp-up 5 --output results.json

Runs as a file from a checkout: with the packages of tests/requirements-test.txt, or with the checkout's .venv.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = Path(os.environ.get("HYPERCORE_VENV") or ROOT / ".venv") / "bin" / "python"
_STARTED_AGAIN = "LOAD_TEST_IN_VENV"

sys.path.insert(0, str(ROOT / "src"))
try:
    import hdrh.histogram  # noqa: F401 (the last package that the command would miss)

    from hypercore_agents.cli.main import main
except ModuleNotFoundError as error:
    if VENV.exists() and _STARTED_AGAIN not in os.environ:
        os.environ[_STARTED_AGAIN] = "1"
        os.execv(VENV, [str(VENV), __file__, *sys.argv[1:]])
    sys.exit(f"the load test needs the package {error.name}: pip install -r {ROOT / 'tests/requirements-test.txt'}")

sys.argv[1:1] = ["loadtest"]
main()
