"""`python -m hypercore_agents` is the `hypercore-agents` command."""

from hypercore_agents.cli.main import main

main()
