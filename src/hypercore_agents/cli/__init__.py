"""The hypercore-agents command."""
