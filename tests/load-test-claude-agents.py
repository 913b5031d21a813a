#!/usr/bin/env python3
"""Runs a load test against a running platform, like `hypercore-agents loadtest`.

tests/load-test-claude-agents.py --api-url URL --users 10 --requests 5 --ramp-up 5 --output results.json

Needs only a checkout, and the packages of tests/requirements-test.txt or the checkout's .venv.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = Path(os.environ.get("HYPERCORE_VENV") or ROOT / ".venv") / "bin" / "python"
_RESTARTED = "LOAD_TEST_IN_VENV"

sys.path.insert(0, str(ROOT / "src"))
try:
    import hdrh.histogram  # noqa: F401 (the command imports it last)

    from hypercore_agents.cli.main import main
except ModuleNotFoundError as error:
    if VENV.exists() and _RESTARTED not in os.environ:
        os.environ[_RESTARTED] = "1"
        os.execv(VENV, [str(VENV), __file__, *sys.argv[1:]])
    sys.exit(f"the load test needs the package {error.name}: pip install -r {ROOT / 'tests/requirements-test.txt'}")

sys.argv[1:1] = ["loadtest"]
main()
