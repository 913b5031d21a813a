#!/usr/bin/env python3
"""Load test of a running platform; the same as `hypercore-agents loadtest`.

tests/load-test-claude-agents.py --api-url URL --users 10 --requests 5 --ramp-up 5 --output results.json
"""

import sys

from hypercore_agents.cli.main import main

sys.argv[1:1] = ["loadtest"]
main()
