"""Agents: their life, the pool, and the reconciler that keeps wanted and observed state together."""
