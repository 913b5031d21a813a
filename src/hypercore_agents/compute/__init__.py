"""Compute backends, which run agents in sandboxes: their contract (`base`), and one package for each backend."""
